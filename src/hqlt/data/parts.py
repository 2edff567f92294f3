"""What is prepared: the sources, one after another, and which split the documents of each are for."""

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
SHARE = 0.005
"""Of the documents, for validation and for test each, where nothing else is said."""


@dataclass(frozen=True)
class Part:
    source: Source
    split: Split | tuple[float, float]
    """The one split of all documents, or the shares that validation and test get of them."""

    @property
    def splits(self) -> tuple[Split, ...]:
        """Those that documents are wanted for."""
        if isinstance(self.split, tuple):
            return ("train", *(name for name, share in zip(HELD_OUT, self.split, strict=True) if share))
        return (self.split,)

    def holdout(self, elsewhere: Collection[int]) -> Holdout | None:
        """How documents are shared out; a look at the source's first ones, which are read again later.

        elsewhere: documents that have another use, as `held_out_documents` gives them.
        """
        if isinstance(self.split, str):
            return None
        return Holdout.of(self.without(elsewhere, copy.copy(self.source)), *self.split)

    def without(self, elsewhere: Collection[int], texts: Iterable[str]) -> Iterator[str]:
        """The source's documents but for those that are held out by files of one's own."""
        unknown = not elsewhere or isinstance(self.split, str)
        return (text for text in texts if unknown or hash64(text.strip()) not in elsewhere)

    def identity(self) -> dict[str, Any]:
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
    """What is prepared: the parts in the order in which they are read.

    Args:
        source: python-library, a file, a folder, the name of a dataset on the hub, or a Source. Files are read as their
            endings say: text, JSON lines, Parquet.
        text_field: the field or column with the text, in JSON lines, Parquet and datasets; text by default.
        subset: of a dataset on the hub, such as sample-100BT.
        split: of a dataset on the hub; train by default.
        separator: a line that stands between two documents of a text file, "" for blank lines; by default a file is one
            document.
        pattern: which files of a folder, such as "*.py"; text, JSON lines or Parquet files by default.
        validation: a file or folder for validation, whose documents are skipped in the source; by default documents are
            held out.
        test: a file or folder for the test split, in the same way.
        validation_share: of the documents; 0.005 by default, and at least one.
        test_share: of the documents; 0.005 by default, and at least one.

    Raises:
        ValueError: for a wrong source, and for an option that it has no use for: other documents than were meant would
            be read.
    """
    told = {"text_field": text_field, "subset": subset, "split": split, "separator": separator, "pattern": pattern}
    given = {name for name, value in told.items() if value is not None}
    if source == PYTHON_LIBRARY:
        _refuse_unused(given, PYTHON_LIBRARY)
        if (validation, test, validation_share, test_share) != (None, None, None, None):
            raise ValueError(f"{PYTHON_LIBRARY}: expected no validation or test of your own, as it has fixed ones")
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
    """A dataset on the hub. Raises ValueError for a name that is meant as a path."""
    path = Path(name).expanduser()
    if path.is_absolute() or name.startswith((".", "~")) or kind_of(path, NAMED_KINDS):
        raise ValueError(f"{name}: expected a file or a folder, found none")
    require("datasets")
    return Hub(name, subset, split or "train", text_field)


def _refuse_unused(given: Collection[str], source: str) -> None:
    for name in sorted(given):
        raise ValueError(f"{name}: expected none, as {source} has no use for it; leave out --{name.replace('_', '-')}")


def held_out_documents(parts: Sequence[Part]) -> frozenset[int]:
    """Hashes of the documents in files of one's own for validation and test, which nothing is to be trained on.

    White space around a document does not make it another one.
    """
    if all(isinstance(part.split, str) for part in parts):  # the splits of one source, which has its own rule
        return frozenset()
    own = (part for part in parts if isinstance(part.split, str))
    return frozenset(hash64(text.strip()) for part in own for text in copy.copy(part.source))


def training_texts(parts: Sequence[Part]) -> Iterator[str]:
    """The documents of the training split."""
    elsewhere = held_out_documents(parts)
    for part in parts:
        holdout = part.holdout(elsewhere)
        for text in part.without(elsewhere, copy.copy(part.source)):
            if (holdout.split_of(text) if holdout else part.split) == "train":
                yield text


def _library(split: Split) -> Part:
    files = library_files(split)
    return Part(TextFiles(files, Path(os.path.commonpath(files))), split)


def _share_of(name: str, share: float | None, file: Path | None) -> float:
    if file is None:
        return SHARE if share is None else share
    if share:
        raise ValueError(f"{name}_share: expected none, as --{name} gives the documents, got {share}")
    return 0.0
