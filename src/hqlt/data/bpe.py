"""Training a byte-level BPE tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from hqlt.data.tokenizer import END_OF_TEXT, FastTokenizer, load_tokenizer
from hqlt.disk import new_folder

MIN_VOCABULARY = 257
"""All 256 bytes, and the end-of-text token."""


def train_tokenizer(
    texts: Iterable[str], vocabulary: int, folder: str | Path, limit_bytes: int | None = None
) -> FastTokenizer:
    """Train a byte-level BPE tokenizer and save it where `load_tokenizer` and AutoTokenizer can load it.

    Any text can be encoded and decodes to itself. The same texts produce the same file. Id 0 is `<|endoftext|>`.

    Args:
        texts: the training documents.
        vocabulary: total number of ids. The result is smaller if the texts contain too few pairs that occur twice.
        folder: where the tokenizer is saved; it must be new or empty.
        limit_bytes: stop reading after the document that reaches this many bytes; None: read all texts.

    Returns:
        The trained tokenizer, loaded from the folder.

    Raises:
        ValueError: if `vocabulary` is below 257 or `limit_bytes` below 1. Arguments are checked before reading.
        OSError: if the folder is not empty or cannot be written.

    Example:
        >>> from hqlt.data import train_tokenizer
        >>> tokenizer = train_tokenizer(["the cat sat on the mat"] * 2, vocabulary=260, folder="tokenizer")
        >>> tokenizer.vocab_size, tokenizer.decode(tokenizer.encode("the mat"))
        (260, 'the mat')
    """
    folder = Path(folder)
    if vocabulary < MIN_VOCABULARY:
        raise ValueError(
            f"vocabulary: expected at least {MIN_VOCABULARY} (256 bytes and the end-of-text token), got {vocabulary}; "
            f"to train on bytes, no tokenizer needs to be trained: --tokenizer=bytes"
        )
    if limit_bytes is not None and limit_bytes < 1:
        raise ValueError(f"limit_bytes: expected at least 1, got {limit_bytes}")
    with new_folder(folder):
        _train(up_to(texts, limit_bytes), vocabulary, str(folder)).save(folder)
    trained = load_tokenizer(folder)
    assert isinstance(trained, FastTokenizer)
    return trained


def _train(texts: Iterable[str], vocabulary: int, name: str) -> FastTokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return FastTokenizer(name, tokenizer, tokenizer.token_to_id(END_OF_TEXT))


def up_to(texts: Iterable[str], limit_bytes: int | None) -> Iterator[str]:
    """The texts up to and including the one that reaches the limit."""
    read = 0
    for text in texts:
        yield text
        read += len(text.encode())
        if limit_bytes is not None and read >= limit_bytes:
            return
