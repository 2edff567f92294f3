"""A tokenizer of one's own: byte-level BPE."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from hqlt.data.tokenizer import END_OF_TEXT, FastTokenizer, load_tokenizer
from hqlt.disk import new_folder

LEAST = 257
"""Every byte, and the end of a text."""


def train_tokenizer(
    texts: Iterable[str], vocabulary: int, folder: str | Path, limit_bytes: int | None = None
) -> FastTokenizer:
    """Learn the merges of byte-level BPE from the texts, and write what `load_tokenizer` and AutoTokenizer read.

    Every text can be encoded, and decodes to itself. The same texts give the same file. Id 0 is `<|endoftext|>`.

    vocabulary: ids in all; fewer where the texts have not so many pairs that occur twice.
    limit_bytes: stop reading after the document with which so much was read.
    Raises ValueError for a vocabulary below 257, OSError for a folder that is not empty or cannot be written; all
    before anything is read.
    """
    folder = Path(folder)
    if vocabulary < LEAST:
        raise ValueError(
            f"vocabulary: expected at least {LEAST} (each byte and the end of a text), got {vocabulary}; "
            f"bytes alone need no training: --tokenizer=bytes"
        )
    if limit_bytes is not None and limit_bytes < 1:
        raise ValueError(f"limit_bytes: expected at least 1, got {limit_bytes}")
    with new_folder(folder):
        _trained(up_to(texts, limit_bytes), vocabulary, str(folder)).save(folder)
    trained = load_tokenizer(folder)
    assert isinstance(trained, FastTokenizer)
    return trained


def _trained(texts: Iterable[str], vocabulary: int, name: str) -> FastTokenizer:
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
    read = 0
    for text in texts:
        yield text
        read += len(text.encode())
        if limit_bytes is not None and read >= limit_bytes:
            return
