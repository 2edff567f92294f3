"""Encoding piece by piece, cached or not, equals encoding the whole text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from hqlt.data import load_tokenizer
from hqlt.data.tokenizer import FastTokenizer
from hqlt.language.encoder import CachedEncoder, entry_bytes

SPECIAL = ["<s>", "<<s>", "<|end|>", "<mask>", "<pad>", "<tool>", "Word", "hey"]
CORPUS = ["the cat sat on the mat, the hat. \n\n"] * 9


def trained(kind: str) -> FastTokenizer:
    """A tokenizer with added tokens of all kinds: stripping spaces, matching whole words, and normalized."""
    backend = Backend(models.BPE(unk_token=None))
    match kind:
        case "bytes":
            backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
            backend.decoder = decoders.ByteLevel()
        case "space before all":
            backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        case _:
            backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind)
    alphabet = [*map(chr, range(0x20, 0x7F)), "▁", "\n", *pre_tokenizers.ByteLevel.alphabet()]
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_special_tokens(
        [*SPECIAL[:3], AddedToken("<mask>", lstrip=True), AddedToken("<pad>", rstrip=True, lstrip=True)]
    )
    backend.add_tokens(
        [AddedToken("<tool>", normalized=False, rstrip=True), AddedToken("Word", single_word=True, normalized=False)]
    )
    backend.add_tokens(["hey"])
    return FastTokenizer(kind, backend, eos_id=None)


TOKENIZERS = [trained(kind) for kind in ("bytes", "space before all", "first", "always", "never")]
TEXTS = st.lists(st.sampled_from([*SPECIAL, " ", "\n", "the cat", " sat", "a", "<", "."]), max_size=12).map("".join)


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=lambda tokenizer: tokenizer.name)
@given(st.lists(TEXTS, min_size=1, max_size=4), st.sampled_from([0, 150, 1 << 20]))
def test_cached_encoding_equals_encoding_the_whole_text(tokenizer, texts, max_bytes):
    encode = CachedEncoder(tokenizer, max_bytes)
    for i in range(len(texts)):
        text = "".join(texts[: i + 1])
        assert "".join(tokenizer.split_prompt(text)) == text
        assert encode(text) == tokenizer.encode_prompt(text, add_special_tokens=False)
    assert encode._bytes <= max_bytes


def test_cached_pieces_are_not_encoded_again(monkeypatch):
    tokenizer, encoded = TOKENIZERS[0], []
    prompt = tokenizer.encode_prompt
    monkeypatch.setattr(
        tokenizer, "encode_prompt", lambda text, **options: encoded.append(text) or prompt(text, **options)
    )
    encode = CachedEncoder(tokenizer)
    encode("<s>the cat<|end|>the hat")
    assert encoded == ["<s>the cat", "<|end|>the hat"]
    encode("<s>the cat<|end|>the hat<s>the mat")
    assert encoded[2:] == ["<s>the mat"]
    encode("<s>the cat<|end|>", salt="another's")
    assert encoded[3:] == ["<s>the cat", "<|end|>"]
    assert encode._bytes == sum(entry_bytes(text, ids) for (_, text), ids in encode._cache.items())


def test_texts_are_not_split_if_special_tokens_are_plain_text():
    text = "<s>the cat<|end|>"
    assert load_tokenizer("bytes").split_prompt(text) == [text]
    tokenizer = FastTokenizer("as text", TOKENIZERS[0].tokenizer, eos_id=None, split_special_tokens=True)
    assert tokenizer.split_prompt(text) == [text] and CachedEncoder(tokenizer)(text) == tokenizer.encode(text)
