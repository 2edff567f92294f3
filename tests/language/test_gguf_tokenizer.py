"""The tokenizer rebuilt from a GGUF file gives the ids of the original one."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from typing import Any

import pytest
from tokenizers import Regex, normalizers, pre_tokenizers
from transformers import AutoTokenizer, GPT2Tokenizer, LlamaTokenizer, Qwen2Tokenizer

from hqlt.language.gguf_tokenizer import tokenizer_in
from tests.gguf_files import tokenizer_fields, trained

SPECIAL = ["<|begin|>", "<|end|>"]
TEXTS = [
    "It's 12345 o'clock; they'll say: \"We've 7 of them\", and we'd better go.\n\n  def f(x):\n\t\treturn x ** 2  # ok",
    "Über den Fluß führte eine Fähre — 橋は今も立っている 🌉. e\N{COMBINING ACUTE ACCENT} ½ x² ٣٤٥ 1/2",
    " leading and trailing  spaces   \n", "\r\n\r\nWORDS IN CAPITALS'LL DO\u00a0so", "", "a", "<|end|> in a text",
]  # fmt: skip
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
OF_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)


def split(expression: str) -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(expression), "isolated"), BYTES])


ORIGINALS: dict[str, tuple[Any, dict[str, Any]]] = {
    "gpt-2": (OF_GPT2, {}),
    "smollm": (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), OF_GPT2]), {}),
    "llama-bpe": (split(LLAMA3), {"ignore_merges": True}),
    "qwen2": (split(LLAMA3.replace("{1,3}", "")), {}),
}
"""The pre-tokenizers in the tokenizer.json of each model."""


def original(pre: str) -> Any:
    words, options = ORIGINALS[pre]
    tokenizer = trained(words, TEXTS * 3, 420, SPECIAL, **options)
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


@pytest.mark.parametrize("pre", ORIGINALS)
def test_byte_level_bpe_equals_the_original(pre):
    theirs = original(pre)
    ours = tokenizer_in(tokenizer_fields(theirs, pre, SPECIAL) | {"tokenizer.ggml.add_bos_token": False})
    for text in TEXTS:
        expected = theirs.encode(text).ids
        assert ours.encode(text) == expected
        assert ours.decode(expected) == (theirs.normalizer.normalize_str(text) if pre == "qwen2" else text)
    assert (ours.bos_token, ours.eos_token, len(ours)) == (*SPECIAL, theirs.get_vocab_size())
    assert 1 in ours.encode("<|end|> in a text")


@pytest.mark.parametrize(("pre", "kind"), [("gpt-2", GPT2Tokenizer), ("qwen2", Qwen2Tokenizer)])
def test_byte_level_bpe_equals_transformers(pre, kind):
    """transformers' own classes define how each one splits and normalizes."""
    fields = tokenizer_fields(original(pre), pre, SPECIAL)
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    theirs = kind(vocab={token: id for id, token in enumerate(tokens)}, merges=merges, unk_token="<|end|>")
    ours = tokenizer_in(fields)
    for text in TEXTS[:-1]:
        assert ours.encode(text) == theirs.encode(text)


def test_special_tokens_saved_and_loaded(tmp_path):
    """Including the chat template, and placeholders of unused embeddings."""
    fields = tokenizer_fields(original("smollm"), "smollm", SPECIAL)
    fields["tokenizer.ggml.tokens"] += ["<think>", "[PAD]"]
    fields["tokenizer.ggml.token_type"] += [4, 5]
    fields |= {"tokenizer.chat_template": "{{ messages[0].content }}", "tokenizer.ggml.padding_token_id": 1}
    text = "a <think> b"
    plain = tokenizer_in(fields)
    assert len(plain) == len(fields["tokenizer.ggml.tokens"]) - 1
    assert plain.encode(text)[0] != 0 and len(plain) - 1 in plain.encode(text)
    assert "<think>" in plain.decode(plain.encode(text), skip_special_tokens=True)
    for begin, end in ((True, False), (False, True), (True, True)):
        added = {"tokenizer.ggml.add_bos_token": begin, "tokenizer.ggml.add_eos_token": end}
        tokenizer_in(fields | added).save_pretrained(tmp_path)
        loaded = AutoTokenizer.from_pretrained(tmp_path)
        assert loaded.encode(text) == [0] * begin + plain.encode(text) + [1] * end
        assert loaded.encode(text, add_special_tokens=False) == plain.encode(text)
        assert (loaded.chat_template, loaded.pad_token_id) == ("{{ messages[0].content }}", 1)
    assert tokenizer_in(tokenizer_fields(original("llama-bpe"), "llama-bpe", SPECIAL)).encode("a")[0] == 0


PIECES = [
    "▁", "t", "h", "e", "a", "n", "d", "s", "o", "▁t", "he", "▁the", "an", "nd", "and", "▁a", "▁and", "es", "the", "en",
    "▁s", "so", "os", "▁so", "ha", "hat", "at", "▁th", "▁that", "ne", "on", "no", "▁no", "don", "do", "▁do", "▁▁", ".",
]  # fmt: skip


def sentence_piece_fields() -> dict[str, Any]:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
    order = random.Random(0).sample(range(len(PIECES)), len(PIECES))
    scores = [0.0] * 259 + [-float(i) for i in order]
    types = [2, 3, 3, *[6] * 256, *[1] * len(PIECES)]
    return {f"tokenizer.ggml.{name}": value for name, value in {
        "model": "llama", "tokens": tokens, "scores": scores, "token_type": types, "bos_token_id": 1,
        "eos_token_id": 2, "unknown_token_id": 0,
    }.items()}  # fmt: skip


def merged(text: str, fields: dict[str, Any]) -> list[int]:
    """SentencePiece merges the neighbors whose concatenation has the highest score; the first of equals."""
    ids = {token: i for i, token in enumerate(fields["tokenizer.ggml.tokens"])}
    scores = fields["tokenizer.ggml.scores"]
    parts = list("▁" + text.replace(" ", "▁"))
    while True:
        pairs = [(-scores[ids[a + b]], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ids]
        if not pairs:
            break
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return [id for part in parts for id in ([ids[part]] if part in ids else [3 + byte for byte in part.encode()])]


def test_sentencepiece_merges_by_score():
    fields = sentence_piece_fields()
    ours = tokenizer_in(fields)
    drawn = random.Random(1)
    texts = ["".join(drawn.choice("thendaso  .") for _ in range(n)) for n in range(1, 60)] + ["the é and 🌉\n", " a"]
    for text in texts:
        assert ours.encode(text) == [1, *merged(text, fields)]
        assert ours.decode(ours.encode(text), skip_special_tokens=True) == text
    vocabulary = {token: id for id, token in enumerate(fields["tokenizer.ggml.tokens"])}
    merges = json.loads(ours.backend_tokenizer.to_str())["model"]["merges"]
    theirs = LlamaTokenizer(vocab=vocabulary, merges=[tuple(pair) for pair in merges])
    for text in texts:
        if not text.startswith(" "):  # SentencePiece adds a space here too, LlamaTokenizer does not
            assert ours.tokenize(text) == theirs.tokenize(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "bert"}, "tokenizer.ggml.model: expected one of 'gpt2', 'llama', got 'bert'"),
        ({"model": None}, "tokenizer.ggml.model: expected one of 'gpt2', 'llama', got 'None'"),
        (
            {"pre": "tekken"},
            "tokenizer.ggml.pre: expected one of 'gpt-2', 'smollm', 'llama-bpe', 'qwen2', got 'tekken'",
        ),
        ({"merges": None}, "expected tokens, their types and merges .*, got KeyError"),
        ({"merges": ["a b c"]}, "expected tokens, their types and merges .*, got"),
        ({"merges": ["no such"]}, "expected tokens, their types and merges .*, got"),
        ({"bos_token_id": 10_000}, "expected tokens, their types and merges .*, got IndexError"),
    ],
)
def test_tokenizers_that_cannot_be_rebuilt_exactly_are_refused(change, message):
    fields = tokenizer_fields(original("gpt-2"), "gpt-2", SPECIAL)
    fields |= {f"tokenizer.ggml.{name}": value for name, value in change.items()}
    with pytest.raises(ValueError, match=message):
        tokenizer_in({name: value for name, value in fields.items() if value is not None})


def test_a_normalization_of_the_text_is_refused():
    with pytest.raises(ValueError, match="remove_extra_whitespaces: expected none, as in Llama 2"):
        tokenizer_in(sentence_piece_fields() | {"tokenizer.ggml.remove_extra_whitespaces": True})
