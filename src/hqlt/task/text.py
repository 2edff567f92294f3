"""Real text that every machine has: the source code of the Python standard library, byte by byte."""

from __future__ import annotations

import functools
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hqlt.registry import register
from hqlt.seeds import hash64
from hqlt.task.task import Batch, Split, Task

SKIPPED = {
    *("site-packages", "dist-packages", "lib2to3", "ensurepip"),  # third-party packages, or copies of them
    *("test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__"),  # tables, many nearly identical
}
"""Folders that are not read, because the same text could end up in both training and test files."""


@register("task", "text")
@dataclass(frozen=True, kw_only=True)
class StandardLibrary(Task):
    """Predict the next byte of Python source. One file in twenty is held out for validation, another for test.

        inputs    d e f _ f
        targets   e f _ f (
        resets    1 0 0 0 0      (a file begins)

    The files of a split are concatenated in an order that depends only on their names. A sequence of `length` bytes
    may begin anywhere. The first byte of each file begins a segment, so that nothing is remembered across files.
    """

    length: int = 256
    """Number of bytes in a sequence."""

    vocab_size = 256
    metric = "bits"
    chance = 1 / 256
    coordinate_name = "position in the window"

    def sample(self, generator: torch.Generator, rows: int, split: Split) -> Batch:
        source, begins = files_of(split)
        start = torch.randint(0, len(source) - self.length - 1, (rows, 1), generator=generator)
        window = start + torch.arange(self.length + 1)
        tokens = source[window].long()
        return Batch(
            inputs=tokens[:, :-1],
            targets=tokens[:, 1:],
            coordinate=torch.arange(self.length).expand(rows, -1),
            resets=begins[window[:, :-1]],
        )


@functools.cache
def files_of(split: Split) -> tuple[Tensor, Tensor]:
    """Read all files of a split.

    Returns:
        The bytes (uint8 [n]), and which of them begin a file (bool [n]).
    """
    texts = [np.frombuffer(path.read_bytes(), dtype=np.uint8) for path in library_files(split)]
    texts = [text for text in texts if len(text)]
    begins = np.zeros(sum(map(len, texts)), dtype=bool)
    begins[np.cumsum([0, *map(len, texts[:-1])])] = True
    return torch.from_numpy(np.concatenate(texts)), torch.from_numpy(begins)


def library_files(split: Split) -> list[Path]:
    """List the library's source files of a split, in an order that depends only on their names.

    Raises:
        FileNotFoundError: if this Python has no source files of its standard library.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    files = {path.relative_to(library): path for path in library.rglob("*.py")}
    names = [name for name in files if not SKIPPED & set(name.parts) and _split_of(name) == split]
    if not names:
        raise FileNotFoundError(
            f"{library}: expected the source files of Python's standard library, found none for the {split} split; "
            f"some minimal installations lack them: install Python's full package"
        )
    return [files[name] for name in sorted(names, key=_hash)]


def _hash(path: Path) -> bytes:
    return hash64(path.as_posix()).to_bytes(8, "little")


def _split_of(path: Path) -> Split:
    twentieth = _hash(path)[0] % 20
    return "test" if twentieth == 0 else "validation" if twentieth == 1 else "train"
