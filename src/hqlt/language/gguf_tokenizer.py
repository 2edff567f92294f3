"""The tokenizer inside a GGUF file, as the tokenizer.json that the model was published with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hqlt.registry import check_choice

ORDINARY, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5
"""Types of tokens."""
SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
"""transformers' names of special tokens, and how the fields of their ids begin."""
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""SentencePiece's."""


class Words(NamedTuple):
    """How a BPE over bytes splits a text before it merges."""

    parts: tuple[Any, ...]
    normalizer: Any = None
    ignore_merges: bool = False
    """A word that is a token is this token, whatever the merges say."""
    begins: bool = False
    """Whether `bos` stands before every text where the file does not say."""


def _words(digits: str) -> tuple[Any, ...]:
    """Llama 3's and Qwen2's, which differ in how many digits stand together."""
    expression = (
        rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    split = pre_tokenizers.Split(Regex(expression), behavior="isolated")
    return split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


OF_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
WORDS = {
    "gpt-2": Words((OF_GPT2,)),
    "smollm": Words((pre_tokenizers.Digits(individual_digits=True), OF_GPT2)),
    "llama-bpe": Words(_words("{1,3}"), ignore_merges=True, begins=True),
    "qwen2": Words(_words(""), normalizers.NFC()),
}
"""By `tokenizer.ggml.pre`, as the tokenizer.json of GPT-2, SmolLM, Llama 3 and Qwen2 have it."""


def tokenizer_in(fields: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """fields: of a file (`hqlt.model.pretrained.gguf.Gguf`).

    Raises ValueError for a tokenizer that is not rebuilt exactly here, by what is unknown of it.
    """
    said = {name.removeprefix("tokenizer.ggml."): value for name, value in fields.items() if "tokenizer.ggml." in name}
    check_choice("tokenizer.ggml.model", str(said.get("model")), KINDS)
    try:
        tokenizer, begins = KINDS[said["model"]](said)
        tokens, types = said["tokens"], said["token_type"]
        tokenizer.add_tokens(
            [
                AddedToken(token, special=type != USER_DEFINED, normalized=False)
                for token, type in zip(tokens, types, strict=True)
                if type in (UNKNOWN, CONTROL, USER_DEFINED)
            ]
        )
        named = {ours: tokens[id] for ours, name in SPECIAL.items() if (id := said.get(f"{name}_token_id")) is not None}
    except ValueError:
        raise
    except Exception as error:  # `tokenizers` raises nothing narrower
        raise ValueError(
            f"tokenizer.ggml: expected its tokens, their types and how they merge, got {error!r}"
        ) from error
    begin = [named["bos_token"]] if said.get("add_bos_token", begins) else []
    end = [named["eos_token"]] if said.get("add_eos_token", False) else []
    if around := [(token, tokens.index(token)) for token in dict.fromkeys(begin + end)]:
        tokenizer.post_processor = processors.TemplateProcessing(single=[*begin, "$A", *end], special_tokens=around)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        chat_template=fields.get("tokenizer.chat_template"),
        **named,
    )


def bpe_over_bytes(said: Mapping[str, Any]) -> tuple[Any, bool]:
    """And whether `bos` stands before every text where the file does not say."""
    check_choice("tokenizer.ggml.pre", str(said.get("pre")), WORDS)
    words = WORDS[said["pre"]]
    merges = [tuple(merge.split(" ")) for merge in said["merges"]]
    tokenizer: Any = Tokenizer(models.BPE(vocab=_vocabulary(said), merges=merges, ignore_merges=words.ignore_merges))
    if words.normalizer is not None:
        tokenizer.normalizer = words.normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(words.parts))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, words.begins


def sentence_pieces(said: Mapping[str, Any]) -> tuple[Any, bool]:
    """SentencePiece's BPE, as Llama 2 and Mistral have it: what two tokens make merges in the order of its score."""
    for name in ("precompiled_charsmap", "remove_extra_whitespaces"):
        if said.get(name):
            raise ValueError(f"tokenizer.ggml.{name}: expected none, as in Llama 2, got a normalization of the text")
    vocabulary = _vocabulary(said)
    merges = [
        (-said["scores"][id], vocabulary[token[:i]], vocabulary[token[i:]], token[:i], token[i:])
        for token, id in vocabulary.items()
        for i in range(1, len(token))
        if said["token_type"][id] == ORDINARY and token[:i] in vocabulary and token[i:] in vocabulary
    ]
    unknown = said["tokens"][said["token_type"].index(UNKNOWN)]
    pairs = [(first, second) for *_, first, second in sorted(merges)]
    tokenizer: Any = Tokenizer(models.BPE(vocabulary, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    begins = bool(said.get("add_space_prefix", True))
    tokenizer.normalizer = normalizers.Sequence(
        [*([normalizers.Prepend(SPACE)] if begins else []), normalizers.Replace(" ", SPACE)]
    )
    strip = [decoders.Strip(" ", 1, 0)] if begins else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer, True


KINDS = {"gpt2": bpe_over_bytes, "llama": sentence_pieces}
"""By `tokenizer.ggml.model`."""


def _vocabulary(said: Mapping[str, Any]) -> dict[str, int]:
    """Without the names that fill up rows of the embeddings which mean nothing."""
    pairs = zip(said["tokens"], said["token_type"], strict=True)
    return {token: id for id, (token, type) in enumerate(pairs) if type != UNUSED}
