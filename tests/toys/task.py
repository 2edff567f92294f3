"""A task that hqlt does not know: which of two tokens came more often?"""

from __future__ import annotations

from dataclasses import dataclass

import torch

import hqlt
from hqlt.task import IGNORE, Batch, Split, Task


@hqlt.register("task", "toy-majority")
@dataclass(frozen=True, kw_only=True)
class Majority(Task):
    """An odd number of tokens 1 and 2, then 0, at which the more frequent one is asked for.

    inputs    1 2 2 0
    targets   · · · 2
    """

    length: int = 31

    vocab_size = 3
    chance = 0.5
    coordinate_name = "margin"

    def __post_init__(self) -> None:
        if self.length < 1 or self.length % 2 == 0:
            raise ValueError(f"length: expected an odd number of at least 1, got {self.length}")

    def sample(self, generator: torch.Generator, rows: int, split: Split) -> Batch:
        tokens = torch.randint(1, 3, (rows, self.length), generator=generator)
        margin = 2 * (tokens == 2).sum(dim=1, keepdim=True) - self.length
        inputs = torch.cat([tokens, torch.zeros(rows, 1, dtype=torch.long)], dim=1)
        targets = torch.full_like(inputs, IGNORE)
        targets[:, -1:] = torch.where(margin > 0, 2, 1)
        return Batch(inputs, targets, margin.abs().expand_as(inputs))
