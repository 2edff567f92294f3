"""Batches of tokens: shuffled windows, or contiguous text for a state that is carried from batch to batch."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from hqlt.data.files import TokenFiles
from hqlt.data.permutation import permute
from hqlt.seeds import hash64
from hqlt.task.task import IGNORE, Batch


class Windows:
    """Batches of shuffled windows of `length` + 1 tokens. The sequence is endless, with a new order in each epoch.

        tokens    a b c . d e .      (two documents; . ends a document)
        inputs    a b c . d e
        targets   b c . – e .        (–: IGNORE; the first token of a document is never predicted)
        resets    1 0 0 0 1 0        (the first token of the window and of each document)

    Window i covers the tokens i·length … (i+1)·length, so each token is a target at most once per epoch; up to `length`
    tokens at the end are unused. Batches are a pure function of their index, whatever the number of ranks.

    Args:
        files: the split to read.
        length: tokens per row of a batch.
        seed: determines the order.

    Raises:
        ValueError: if `length` is below 1 or the split has fewer than `length` + 1 tokens.

    Example:
        >>> import pathlib
        >>> from hqlt.data import TokenFiles, Windows, prepare
        >>> _ = pathlib.Path("text.txt").write_text("a long text, or at least one of some length")
        >>> _ = prepare("text.txt", "data", validation_share=0, test_share=0)
        >>> Windows(TokenFiles("data"), length=8).batch(0, rows=2).inputs.shape
        torch.Size([2, 8])
    """

    def __init__(self, files: TokenFiles, length: int = 256, seed: int = 0) -> None:
        if length < 1 or len(files) < length + 1:
            raise ValueError(
                f"length: expected from 1 to {len(files) - 1}, because the {files.split} split of {files.folder} has "
                f"{len(files)} tokens, got {length}"
            )
        self.files, self.length, self.seed = files, length, seed

    def __len__(self) -> int:
        """Number of windows in an epoch."""
        return (len(self.files) - 1) // self.length

    def batch(self, index: int, rows: int, rank: int = 0, ranks: int = 1) -> Batch:
        """One rank's part of a global batch.

        The parts of all ranks, concatenated in order, are the batch that a single rank would read.

        Args:
            index: index of the batch, from 0; there is no upper limit.
            rows: windows in the global batch.
            rank: index of this rank.
            ranks: number of ranks; must divide `rows`.

        Returns:
            A `Batch` with tensors of shape [rows / ranks, length].

        Raises:
            ValueError: if `rows` is not a multiple of `ranks`, or `rank` is out of range.
        """
        places = index * rows + np.array(rows_of_rank(rows, rank, ranks))
        return batch_of(self.files, self.windows_at(places) * self.length, self.length, first=True)

    def windows_at(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """The windows at these positions of the endless shuffled order."""
        epochs, slots = np.divmod(places, len(self))
        windows = np.empty_like(slots)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            windows[here] = permute(slots[here], len(self), key=hash64("windows", self.seed, epoch))
        return windows


class Stream:
    """Batches of contiguous text, for a state that is carried from batch to batch.

    The data is divided into `rows` equal parts. Row r reads part r: batch i + 1 continues where batch i ended. Resets
    mark the first token of each document and of each epoch, when all rows return to the start of their parts. Batches
    are a pure function of their index.

    Args:
        files: the split to read.
        length: tokens per row of a batch.
        rows: rows in the global batch.

    Raises:
        ValueError: if the split is too short for one batch, or `rows` or `length` is below 1.

    Example:
        >>> import pathlib
        >>> from hqlt.data import Stream, TokenFiles, prepare
        >>> _ = pathlib.Path("text.txt").write_text("a long text, or at least one of some length")
        >>> _ = prepare("text.txt", "data", validation_share=0, test_share=0)
        >>> len(Stream(TokenFiles("data"), length=8, rows=2))
        2
    """

    def __init__(self, files: TokenFiles, length: int = 256, rows: int = 8) -> None:
        if rows < 1 or length < 1 or len(files) - 1 < rows * length:
            raise ValueError(
                f"length, rows: expected at most {len(files) - 1} tokens in a batch, because the {files.split} split "
                f"of {files.folder} has {len(files)}, got {rows} rows of {length}"
            )
        self.files, self.length, self.rows = files, length, rows

    def __len__(self) -> int:
        """Number of batches in an epoch."""
        return (len(self.files) - 1) // (self.rows * self.length)

    def batch(self, index: int, rank: int = 0, ranks: int = 1) -> Batch:
        """One rank's rows of a batch.

        Args:
            index: index of the batch, from 0; there is no upper limit.
            rank: index of this rank.
            ranks: number of ranks; must divide `rows`.

        Returns:
            A `Batch` with tensors of shape [rows / ranks, length].

        Raises:
            ValueError: if `rows` is not a multiple of `ranks`, or `rank` is out of range.
        """
        step = index % len(self)
        row = np.array(rows_of_rank(self.rows, rank, ranks))
        return batch_of(self.files, (row * len(self) + step) * self.length, self.length, first=step == 0)


def batch_of(files: TokenFiles, starts: NDArray[np.int64], length: int, first: bool) -> Batch:
    """Rows of `length` tokens that begin at `starts` [b]. first: mark the first token of each row as a reset."""
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
    """The rows of a global batch that belong to this rank. All ranks have equally many, in order."""
    if rows < 1 or rows % ranks:
        raise ValueError(f"rows: expected a multiple of the {ranks} ranks, got {rows}")
    if not 0 <= rank < ranks:
        raise ValueError(f"rank: expected from 0 to {ranks - 1}, got {rank}")
    return range(rows)[rank * rows // ranks : (rank + 1) * rows // ranks]
