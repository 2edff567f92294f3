"""Reconstruction of the tokenizer in a GGUF file, equal to the tokenizer.json that the model was published with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hqlt.registry import check_choice

ORDINARY, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5
"""Types of tokens."""
SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
"""transformers' names of special tokens → the prefixes of their id fields."""
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""SentencePiece's symbol for a space."""


class PreTokenization(NamedTuple):
    """How a byte-level BPE splits a text into words before merging."""

    parts: tuple[Any, ...]
    normalizer: Any = None
    ignore_merges: bool = False
    """Whether a word that is a token is never split, regardless of the merges."""
    add_bos: bool = False
    """Whether every text begins with `bos` if the file does not say."""


def _split_pattern(digits: str) -> tuple[Any, ...]:
    """The pre-tokenizer of Llama 3 and Qwen2, which differ in the number of digits per word."""
    expression = (
        rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    split = pre_tokenizers.Split(Regex(expression), behavior="isolated")
    return split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


OF_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
PRE_TOKENIZATIONS = {
    "gpt-2": PreTokenization((OF_GPT2,)),
    "smollm": PreTokenization((pre_tokenizers.Digits(individual_digits=True), OF_GPT2)),
    "llama-bpe": PreTokenization(_split_pattern("{1,3}"), ignore_merges=True, add_bos=True),
    "qwen2": PreTokenization(_split_pattern(""), normalizers.NFC()),
}
"""By `tokenizer.ggml.pre`: those in the tokenizer.json of GPT-2, SmolLM, Llama 3 and Qwen2."""


def tokenizer_in(fields: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """Rebuild the tokenizer of a GGUF file.

    Args:
        fields: the fields of the file (`hqlt.model.pretrained.gguf.Gguf`).

    Returns:
        A tokenizer with the same ids, special tokens and chat template.

    Raises:
        ValueError: when it cannot be rebuilt exactly.
    """
    given = {name.removeprefix("tokenizer.ggml."): value for name, value in fields.items() if "tokenizer.ggml." in name}
    check_choice("tokenizer.ggml.model", str(given.get("model")), KINDS)
    try:
        tokenizer, add_bos = KINDS[given["model"]](given)
        tokens, types = given["tokens"], given["token_type"]
        tokenizer.add_tokens(
            [
                AddedToken(token, special=type != USER_DEFINED, normalized=False)
                for token, type in zip(tokens, types, strict=True)
                if type in (UNKNOWN, CONTROL, USER_DEFINED)
            ]
        )
        ids = {special: given.get(f"{prefix}_token_id") for special, prefix in SPECIAL.items()}
        named = {special: tokens[id] for special, id in ids.items() if id is not None}
    except ValueError:
        raise
    except Exception as error:  # `tokenizers` raises nothing narrower
        raise ValueError(
            f"tokenizer.ggml: expected tokens, their types and merges (or scores), got {error!r}"
        ) from error
    begin = [named["bos_token"]] if given.get("add_bos_token", add_bos) else []
    end = [named["eos_token"]] if given.get("add_eos_token", False) else []
    if added := [(token, tokens.index(token)) for token in dict.fromkeys(begin + end)]:
        tokenizer.post_processor = processors.TemplateProcessing(single=[*begin, "$A", *end], special_tokens=added)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        chat_template=fields.get("tokenizer.chat_template"),
        **named,
    )


def byte_level_bpe(given: Mapping[str, Any]) -> tuple[Any, bool]:
    """A byte-level BPE, and whether every text begins with `bos` if the file does not say."""
    check_choice("tokenizer.ggml.pre", str(given.get("pre")), PRE_TOKENIZATIONS)
    words = PRE_TOKENIZATIONS[given["pre"]]
    merges = [tuple(merge.split(" ")) for merge in given["merges"]]
    tokenizer: Any = Tokenizer(models.BPE(vocab=_vocabulary(given), merges=merges, ignore_merges=words.ignore_merges))
    if words.normalizer is not None:
        tokenizer.normalizer = words.normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(words.parts))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, words.add_bos


def sentencepiece_bpe(given: Mapping[str, Any]) -> tuple[Any, bool]:
    """SentencePiece's BPE of Llama 2 and Mistral, and True, because every text begins with `bos` by default.

    A file holds scores, not merges. Two tokens merge if their concatenation is a token, in the order of its score.
    """
    for name in ("precompiled_charsmap", "remove_extra_whitespaces"):
        if given.get(name):
            raise ValueError(f"tokenizer.ggml.{name}: expected none, as in Llama 2, got a normalization of the text")
    vocabulary = _vocabulary(given)
    merges = [
        (-given["scores"][id], vocabulary[token[:i]], vocabulary[token[i:]], token[:i], token[i:])
        for token, id in vocabulary.items()
        for i in range(1, len(token))
        if given["token_type"][id] == ORDINARY and token[:i] in vocabulary and token[i:] in vocabulary
    ]
    unknown = given["tokens"][given["token_type"].index(UNKNOWN)]
    pairs = [(first, second) for *_, first, second in sorted(merges)]
    tokenizer: Any = Tokenizer(models.BPE(vocabulary, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = bool(given.get("add_space_prefix", True))
    tokenizer.normalizer = normalizers.Sequence(
        [*([normalizers.Prepend(SPACE)] if prefix else []), normalizers.Replace(" ", SPACE)]
    )
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer, True


KINDS = {"gpt2": byte_level_bpe, "llama": sentencepiece_bpe}
"""By `tokenizer.ggml.model`."""


def _vocabulary(given: Mapping[str, Any]) -> dict[str, int]:
    """Token → id, without the placeholders of unused embeddings."""
    typed = zip(given["tokens"], given["token_type"], strict=True)
    return {token: id for id, (token, type) in enumerate(typed) if type != UNUSED}
