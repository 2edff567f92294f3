"""What a task is: an endless, seeded source of batches, and the way in which answers are scored."""

from __future__ import annotations

import hashlib
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

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
        resets = None if self.resets is None else self.resets.to(device)
        return Batch(self.inputs.to(device), self.targets.to(device), self.coordinate.to(device), resets)

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


class Task(Protocol):
    """Adding a task is adding one file with a frozen dataclass of this form, and its name in `task/__init__.py`."""

    @property
    def name(self) -> str: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def metric(self) -> Literal["accuracy", "exact", "bits"]:
        """accuracy: share of scored tokens named right, stretched so that chance is 0; exact: share of sequences in
        which all of them are; bits: mean −log₂ p(target)."""

    @property
    def chance(self) -> float:
        """Accuracy of guessing."""

    @property
    def coordinate_name(self) -> str: ...

    def sample(self, generator: torch.Generator, rows: int, split: Split) -> Batch: ...


def generator_for(split: Split, seed: int) -> torch.Generator:
    """A source of randomness that no other split or seed shares."""
    digest = hashlib.sha256(f"{split}/{seed}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
