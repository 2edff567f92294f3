"""What a task is: an endless, seeded source of batches, and the way in which answers are scored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from hqlt.seeds import hash64
from hqlt.shapes import Resets

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

IGNORE = -100
"""The target of a token that is not scored."""


class Batch(NamedTuple):
    inputs: Tensor
    """[b, t] tokens."""
    targets: Tensor
    """[b, t] the token to be named at each position, IGNORE where nothing is asked."""
    coordinate: Tensor
    """[b, t] what a score is drawn against: the length of the sequence, the distance to the answer, the position."""
    resets: Resets | None = None
    """Bool [b, t], True where a token begins a new segment."""

    def to(self, device: torch.device | str) -> Batch:
        return Batch(*(None if part is None else part.to(device) for part in self))  # type: ignore[arg-type]

    def split(self, rows: int) -> list[Batch]:
        """Its rows, so many at a time."""
        return [Batch(*parts) for parts in zip(*(part.split(rows) for part in self if part is not None), strict=True)]

    def packed(self) -> Batch:
        """Two sequences a row, the shortest behind the longest, a reset between them: less padding, the same loss.

        What follows a sequence's last target is dropped. Rows that have segments already stay as they are.
        """
        if self.resets is not None:
            return self
        b, t = self.inputs.shape
        length = ((self.targets != IGNORE) * torch.arange(1, t + 1)).amax(dim=1)
        order = length.argsort(descending=True, stable=True)
        first = order[: (b + 1) // 2, None]
        second = order.flip(0)[: (b + 1) // 2, None]
        ends = length[first]
        both = ends + torch.where(second == first, 0, length[second])  # an odd row out stays alone
        index = torch.arange(int(both.max()))
        row = torch.where(index < ends, first, second)
        column = torch.where(index < ends, index, index - ends).clamp(max=t - 1)
        filled = index < both
        return Batch(
            inputs=torch.where(filled, self.inputs[row, column], 0),
            targets=torch.where(filled, self.targets[row, column], IGNORE),
            coordinate=self.coordinate[row, column],
            resets=(index == 0) | (index == ends),
        )


class Task(ABC):
    """A task is one file: a frozen dataclass, whose fields are its options, under `@hqlt.register("task", NAME)`.

    Its docstring shows one worked example. docs/extending.md has a recipe; tests/task/laws.py is what every task obeys.
    """

    metric: Literal["accuracy", "exact", "bits"] = "accuracy"
    """accuracy: share of scored tokens named right, stretched so that chance is 0; exact: share of sequences in which
    all of them are; bits: mean −log₂ p(target)."""

    @property
    @abstractmethod
    def vocab_size(self) -> int: ...

    @property
    @abstractmethod
    def chance(self) -> float:
        """Accuracy of guessing."""

    @property
    @abstractmethod
    def coordinate_name(self) -> str:
        """What `Batch.coordinate` is."""

    @abstractmethod
    def sample(self, generator: torch.Generator, rows: int, split: Split) -> Batch:
        """Sequences that follow from the generator alone, as all that is random comes from it."""


def generator_for(split: Split, seed: int) -> torch.Generator:
    """A source of randomness that no other split or seed shares."""
    return torch.Generator().manual_seed(hash64(split, seed) >> 1)
