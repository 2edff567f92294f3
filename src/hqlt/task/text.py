"""Real text that every machine has: the source of the Python standard library, byte by byte."""

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

LEFT_OUT = {
    *("site-packages", "dist-packages", "lib2to3", "ensurepip"),  # other people's packages, or copies of others'
    *("test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__"),  # tables, many of them nearly alike
}
"""Folders that are not read: what stands in a test file should not stand in a training file as well."""


@register("task", "text")
@dataclass(frozen=True, kw_only=True)
class StandardLibrary(Task):
    """Name the next byte of Python source. One file in twenty is held out for validation, and one for test.

        inputs    d e f _ f
        targets   e f _ f (
        resets    1 0 0 0 0      (a file begins)

    The files of a split follow each other in an order that depends on their names alone; a window of `length` bytes
    may begin anywhere, and a file's first byte begins a segment: nothing is remembered across files.
    """

    length: int = 256

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
    """All files of a split: their bytes [n] (uint8), and where a file begins [n] (bool)."""
    texts = [np.frombuffer(path.read_bytes(), dtype=np.uint8) for path in library_files(split)]
    texts = [text for text in texts if len(text)]
    begins = np.zeros(sum(map(len, texts)), dtype=bool)
    begins[np.cumsum([0, *map(len, texts[:-1])])] = True
    return torch.from_numpy(np.concatenate(texts)), torch.from_numpy(begins)


def library_files(split: Split) -> list[Path]:
    """The library's source files of a split, in an order that depends on their names alone."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = {path.relative_to(library): path for path in library.rglob("*.py")}
    names = [name for name in files if not LEFT_OUT & set(name.parts) and _split_of(name) == split]
    if not names:
        raise FileNotFoundError(
            f"{library}: expected the source files of Python's standard library, found none for the {split} split; "
            f"some minimal installations leave them out: install Python's full package"
        )
    return [files[name] for name in sorted(names, key=_hash)]


def _hash(path: Path) -> bytes:
    return hash64(path.as_posix()).to_bytes(8, "little")


def _split_of(path: Path) -> Split:
    twentieth = _hash(path)[0] % 20
    return "test" if twentieth == 0 else "validation" if twentieth == 1 else "train"
