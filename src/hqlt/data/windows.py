"""Batches of a text: shuffled windows, or contiguous for a memory that is carried from batch to batch."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from hqlt.data.files import TokenFiles
from hqlt.data.permutation import permute
from hqlt.seeds import hash64
from hqlt.task.task import IGNORE, Batch


class Windows:
    """Windows of `length` + 1 tokens in a shuffled order that is another one each epoch, without end.

        tokens    a b c . d e .      (two documents; . ends one)
        inputs    a b c . d e
        targets   b c . – e .        (–: IGNORE; the first token of the next document is never asked for)
        resets    1 0 0 0 1 0        (the window's first token, and where a document begins)

    Window i holds the tokens i·length … (i+1)·length, so that each token is the target of one window at most; fewer
    than `length` + 1 tokens at the end are left over. Nothing is held between calls: batch `index` is the same whenever
    it is asked for, by however many ranks.
    """

    def __init__(self, files: TokenFiles, length: int = 256, seed: int = 0) -> None:
        if length < 1 or len(files) < length + 1:
            raise ValueError(
                f"length: expected from 1 to {len(files) - 1}, as the {files.split} split of {files.folder} has "
                f"{len(files)} tokens, got {length}"
            )
        self.files, self.length, self.seed = files, length, seed

    def __len__(self) -> int:
        """Windows in an epoch."""
        return (len(self.files) - 1) // self.length

    def batch(self, index: int, rows: int, rank: int = 0, ranks: int = 1) -> Batch:
        """The index-th global batch of `rows` windows: this rank's part, [rows / ranks, length].

        The parts of all ranks, one after another, are the batch of one rank alone.
        """
        places = index * rows + np.array(rows_of_rank(rows, rank, ranks))
        return batch_of(self.files, self.windows_at(places) * self.length, self.length, first=True)

    def windows_at(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Which windows stand at these places of the endless order."""
        epochs, slots = np.divmod(places, len(self))
        windows = np.empty_like(slots)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            windows[here] = permute(slots[here], len(self), key=hash64("windows", self.seed, epoch))
        return windows


class Stream:
    """Row r reads the r-th of `rows` equal stretches of the data; batch i + 1 begins where batch i ended.

    Resets stand where documents begin, and on the first token of an epoch, when all rows are back at the beginnings of
    their stretches. Nothing is held between calls.
    """

    def __init__(self, files: TokenFiles, length: int = 256, rows: int = 8) -> None:
        if rows < 1 or length < 1 or len(files) - 1 < rows * length:
            raise ValueError(
                f"length, rows: expected at most {len(files) - 1} tokens in a batch, as the {files.split} split of "
                f"{files.folder} has {len(files)}, got {rows} rows of {length}"
            )
        self.files, self.length, self.rows = files, length, rows

    def __len__(self) -> int:
        """Batches in an epoch."""
        return (len(self.files) - 1) // (self.rows * self.length)

    def batch(self, index: int, rank: int = 0, ranks: int = 1) -> Batch:
        """The index-th batch: this rank's rows of it, [rows / ranks, length]."""
        step = index % len(self)
        row = np.array(rows_of_rank(self.rows, rank, ranks))
        return batch_of(self.files, (row * len(self) + step) * self.length, self.length, first=step == 0)


def batch_of(files: TokenFiles, starts: NDArray[np.int64], length: int, first: bool) -> Batch:
    """Rows of `length` tokens from these starts [b]; first: whether a row's first token is a reset in any case."""
    read = [files.read(start, start + length + 1) for start in starts.tolist()]
    tokens, begins = map(torch.stack, zip(*read, strict=True))
    resets = begins[:, :-1].clone()
    resets[:, 0] |= first
    return Batch(
        inputs=tokens[:, :-1],
        targets=tokens[:, 1:].masked_fill(begins[:, 1:], IGNORE),
        coordinate=torch.arange(length).expand(len(starts), -1),
        resets=resets,
    )


def rows_of_rank(rows: int, rank: int, ranks: int) -> range:
    """The rows of a global batch that are this rank's: as many for each, in order."""
    if rows < 1 or rows % ranks:
        raise ValueError(f"rows: expected a multiple of the {ranks} ranks, got {rows}")
    if not 0 <= rank < ranks:
        raise ValueError(f"rank: expected from 0 to {ranks - 1}, got {rank}")
    return range(rows)[rank * rows // ranks : (rank + 1) * rows // ranks]
