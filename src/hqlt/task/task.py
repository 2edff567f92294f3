"""The interface of a task: an endless, seeded source of batches, and the metric that scores the answers."""

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
    """A batch of b sequences of t tokens with their targets."""

    inputs: Tensor
    """Int64 [b, t]: tokens."""
    targets: Tensor
    """Int64 [b, t]: the token to predict at each position, or IGNORE for positions that are not scored."""
    coordinate: Tensor
    """[b, t]: the x-coordinate of each position's score in a plot, such as the length of the sequence, the distance to
    the answer or the position."""
    resets: Resets | None = None
    """Bool [b, t]: True for tokens that begin a new segment."""

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on another device."""
        return Batch(*(None if part is None else part.to(device) for part in self))  # type: ignore[arg-type]

    def split(self, rows: int) -> list[Batch]:
        """Split the batch into batches of `rows` rows; the last one may have fewer."""
        return [Batch(*parts) for parts in zip(*(part.split(rows) for part in self if part is not None), strict=True)]

    def packed(self) -> Batch:
        """Pack two sequences into each row, a short one after a long one, with a reset between them.

        This reduces padding and leaves the loss unchanged. Tokens after the last target of a sequence are dropped. A
        batch that already has segments is returned unchanged.
        """
        if self.resets is not None:
            return self
        b, t = self.inputs.shape
        length = ((self.targets != IGNORE) * torch.arange(1, t + 1)).amax(dim=1)
        order = length.argsort(descending=True, stable=True)
        first = order[: (b + 1) // 2, None]
        second = order.flip(0)[: (b + 1) // 2, None]
        ends = length[first]
        both = ends + torch.where(second == first, 0, length[second])  # with an odd number of rows, one stays alone
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
    """Base class of tasks.

    A task is a frozen dataclass in a file of its own. Its fields are its options, its docstring shows a worked example,
    and `@hqlt.register("task", NAME)` gives it a name. docs/extending.md has a recipe; tests/task/laws.py tests the
    properties that every task must have.
    """

    metric: Literal["accuracy", "exact", "bits"] = "accuracy"
    """How answers are scored. "accuracy": the share of scored tokens that are predicted correctly, normalized so that
    chance is 0; "exact": the share of sequences in which every scored token is correct; "bits": mean −log₂ p(target).
    """

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of different tokens."""

    @property
    @abstractmethod
    def chance(self) -> float:
        """Accuracy of random guessing."""

    @property
    @abstractmethod
    def coordinate_name(self) -> str:
        """Axis label for `Batch.coordinate`."""

    @abstractmethod
    def sample(self, generator: torch.Generator, rows: int, split: Split) -> Batch:
        """Draw sequences; all randomness comes from the generator.

        Args:
            generator: the only source of randomness: equal generators give equal batches.
            rows: number of sequences.
            split: "train", "validation" or "test"; some tasks draw longer sequences for the latter two.
        """


def generator_for(split: Split, seed: int) -> torch.Generator:
    """Create the random generator of a split and seed; no two splits or seeds share one.

    Args:
        split: "train", "validation" or "test".
        seed: any integer.

    Returns:
        A CPU generator.

    Example:
        >>> from hqlt.task import Parity, generator_for
        >>> batch = Parity().sample(generator_for("test", seed=0), 8, "test")
        >>> len(batch.inputs)
        8
    """
    return torch.Generator().manual_seed(hash64(split, seed) >> 1)
