"""Contiguous text, for a memory that is carried from batch to batch."""

from __future__ import annotations

import numpy as np

from hqlt.data.files import TokenFiles
from hqlt.data.windows import batch_of, rows_of_rank
from hqlt.task.task import Batch


class Stream:
    """Row r reads the r-th of `rows` equal stretches of the data; batch i + 1 goes on where batch i ended.

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
