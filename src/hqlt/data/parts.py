"""The parts of a data set: sources, and the split that the documents of each one belong to."""

from __future__ import annotations

import copy
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hqlt.data.holdout import Holdout, check_shares
from hqlt.data.hub import Hub
from hqlt.data.local import NAMED_KINDS, LocalFormat, TextFiles, kind_of
from hqlt.data.source import Source
from hqlt.errors import require
from hqlt.seeds import hash64
from hqlt.task.task import Split
from hqlt.task.text import library_files

HELD_OUT: tuple[Split, Split] = ("validation", "test")
PYTHON_LIBRARY = "python-library"
DEFAULT_SHARE = 0.005
"""Default share of the documents that is held out for validation, and for test."""


@dataclass(frozen=True)
class Part:
    """A source, and the split or splits of its documents."""

    source: Source
    split: Split | tuple[float, float]
    """The split of all documents, or the shares that are held out for validation and test."""

    @property
    def splits(self) -> tuple[Split, ...]:
        """The splits that must not be empty."""
        if isinstance(self.split, tuple):
            return ("train", *(name for name, share in zip(HELD_OUT, self.split, strict=True) if share))
        return (self.split,)

    def holdout(self, excluded: Collection[int]) -> Holdout | None:
        """How documents are assigned to splits; None: all are in one split. Reads the first documents of the source.

        excluded: hashes of documents to skip, from `held_out_documents`.
        """
        if isinstance(self.split, str):
            return None
        return Holdout.of(self.without(excluded, copy.copy(self.source)), *self.split)

    def without(self, excluded: Collection[int], texts: Iterable[str]) -> Iterator[str]:
        """The texts without the excluded ones, unless this part itself is a validation or test file."""
        keep_all = not excluded or isinstance(self.split, str)
        return (text for text in texts if keep_all or hash64(text.strip()) not in excluded)

    def identity(self) -> dict[str, Any]:
        """What the documents and their splits depend on, as JSON."""
        return {**self.source.identity(), "for": self.split}


def parts_of(
    source: str | Path | Source,
    *,
    text_field: str | None = None,
    subset: str | None = None,
    split: str | None = None,
    separator: str | None = None,
    pattern: str | None = None,
    validation: Path | None = None,
    test: Path | None = None,
    validation_share: float | None = None,
    test_share: float | None = None,
) -> list[Part]:
    """The parts of a data set, in the order in which they are read.

    Args:
        source: python-library, a file, a folder, the name of a dataset on the Hugging Face hub, or a Source. The suffix
            of a file determines its format: text, JSON Lines or Parquet.
        text_field: name of the field or column with the text, in JSON Lines, Parquet and hub datasets; default: text.
        subset: name of a subset of a hub dataset, such as sample-100BT.
        split: name of a split of a hub dataset; default: train.
        separator: the line between two documents of a text file, "" for blank lines; default: each file is one
            document.
        pattern: glob for the files of a folder, such as "*.py"; default: text, JSON Lines or Parquet files.
        validation: a file or folder with the validation documents, which are skipped in the source; default: documents
            of the source are held out.
        test: a file or folder with the test documents, likewise.
        validation_share: share of the documents held out for validation, at least one document; default: 0.005.
        test_share: share of the documents held out for test, at least one document; default: 0.005.

    Returns:
        The parts: the source, then the validation and test files if given.

    Raises:
        ValueError: if the source does not exist or cannot be read, if the shares are invalid, or if an option does not
            apply to the source.

    Example:
        >>> import pathlib
        >>> from hqlt.data import parts_of
        >>> _ = pathlib.Path("texts.txt").write_text("first text\\n\\nsecond text")
        >>> [part] = parts_of("texts.txt", separator="")
        >>> list(part.source)
        ['first text\\n', 'second text']
    """
    options = {"text_field": text_field, "subset": subset, "split": split, "separator": separator, "pattern": pattern}
    given = {name for name, value in options.items() if value is not None}
    if source == PYTHON_LIBRARY:
        _refuse_unused(given, PYTHON_LIBRARY)
        if (validation, test, validation_share, test_share) != (None, None, None, None):
            raise ValueError(f"{PYTHON_LIBRARY}: expected no validation or test options, because its splits are fixed")
        return [_library("train"), _library("validation"), _library("test")]
    shares = [_share_of("validation", validation_share, validation), _share_of("test", test_share, test)]
    check_shares(*shares)
    own = [(name, file.expanduser()) for name, file in zip(HELD_OUT, (validation, test), strict=True) if file]
    for held, file in own:
        if not file.exists():
            raise ValueError(f"{held}: expected a file or a folder, found none at {file}")
    how = LocalFormat(text_field=text_field or "text", separator=separator, pattern=pattern)
    files = [file for _, file in own]
    folders = any(file.is_dir() for file in files)
    if isinstance(source, Source):
        first = source
    elif (path := Path(source).expanduser()).exists():
        first = how.source_in(path, without=files)
        folders |= path.is_dir()
    else:
        first = _dataset(str(source), subset, split, how.text_field)
    parts = [Part(first, (shares[0], shares[1])), *(Part(how.source_in(file), held) for held, file in own)]
    used = frozenset({"pattern"} if folders else ()).union(*(part.source.options for part in parts))
    _refuse_unused(given - used, str(source))
    return parts


def _dataset(name: str, subset: str | None, split: str | None, text_field: str) -> Hub:
    """A dataset on the hub. Raises ValueError for a name that must be a path."""
    path = Path(name).expanduser()
    if path.is_absolute() or name.startswith((".", "~")) or kind_of(path, NAMED_KINDS):
        raise ValueError(f"{name}: expected a file or a folder, found none")
    require("datasets")
    return Hub(name, subset, split or "train", text_field)


def _refuse_unused(given: Collection[str], source: str) -> None:
    """Raises ValueError if an option is given that the source does not use."""
    for name in sorted(given):
        raise ValueError(f"{name}: expected none, because {source} does not use it; remove --{name.replace('_', '-')}")


def held_out_documents(parts: Sequence[Part]) -> frozenset[int]:
    """Hashes of the documents in the validation and test files, which are excluded from training.

    White space around a document is ignored.
    """
    if all(isinstance(part.split, str) for part in parts):  # a source with predefined splits
        return frozenset()
    own = (part for part in parts if isinstance(part.split, str))
    return frozenset(hash64(text.strip()) for part in own for text in copy.copy(part.source))


def training_texts(parts: Sequence[Part]) -> Iterator[str]:
    """The documents of the training split, such as for training a tokenizer.

    Args:
        parts: what `parts_of` returned.

    Returns:
        An iterator over the texts.

    Example:
        >>> import pathlib
        >>> from hqlt.data import parts_of, training_texts
        >>> _ = pathlib.Path("text.txt").write_text("some text")
        >>> list(training_texts(parts_of("text.txt", validation_share=0, test_share=0)))
        ['some text']
    """
    excluded = held_out_documents(parts)
    for part in parts:
        holdout = part.holdout(excluded)
        for text in part.without(excluded, copy.copy(part.source)):
            if (holdout.split_of(text) if holdout else part.split) == "train":
                yield text


def _library(split: Split) -> Part:
    files = library_files(split)
    return Part(TextFiles(files, Path(os.path.commonpath(files))), split)


def _share_of(name: str, share: float | None, file: Path | None) -> float:
    if file is None:
        return DEFAULT_SHARE if share is None else share
    if share:
        raise ValueError(f"{name}_share: expected none, because --{name} gives the documents, got {share}")
    return 0.0
