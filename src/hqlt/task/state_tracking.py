"""Base classes of tasks that are trained on short sequences and tested on long ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hqlt.registry import check_choice
from hqlt.task.task import IGNORE, Batch, Split, Task


@dataclass(frozen=True, kw_only=True)
class VariableLengthTask(Task):
    """Base class of tasks whose sequences have a random length n, with other lengths in training than in tests."""

    train_lengths: tuple[int, int] = (3, 40)
    """Smallest and largest n in training; n is uniform between them."""
    test_lengths: tuple[int, int] = (40, 256)
    """Smallest and largest n in validation and test."""
    labels: Literal["answer", "prefix"] = "answer"
    """Targets in training: "answer" scores the final answer only, "prefix" also scores the intermediate answer after
    every token. Validation and test always score the final answer only."""

    shortest = 1
    """Smallest n that the task allows."""
    coordinate_name = "length"

    def __post_init__(self) -> None:
        for name, lengths in (("train_lengths", self.train_lengths), ("test_lengths", self.test_lengths)):
            if len(lengths) != 2 or not self.shortest <= lengths[0] <= lengths[1]:
                raise ValueError(
                    f"{name}: expected the smallest and the largest length, {self.shortest} or more, got {lengths}"
                )
        check_choice("labels", self.labels, ("answer", "prefix"))

    def lengths(self, split: Split) -> tuple[int, int]:
        """Smallest and largest n of a split."""
        return self.train_lengths if split == "train" else self.test_lengths

    def scores_prefixes(self, split: Split) -> bool:
        """Whether intermediate answers are scored in this split."""
        return split == "train" and self.labels == "prefix"


@dataclass(frozen=True, kw_only=True)
class StateTracking(VariableLengthTask):
    """Base class of state-tracking tasks: after n − 1 tokens, predict an answer that depends on all of them.

    The length n includes the answer and is uniform. Rows are padded with token 0 on the right. A subclass implements
    `_draw`.

    Source:
        Delétang et al. 2023, "Neural Networks and the Chomsky Hierarchy"; lengths as in the paper, section 4.2.
    """

    shortest = 3

    def sample(self, generator: torch.Generator, rows: int, split: Split) -> Batch:
        count = self._counts(generator, rows, *self.lengths(split))
        tokens, answers = self._draw(generator, count)
        index = torch.arange(tokens.shape[1])
        scored = index < count if self.scores_prefixes(split) else index == count - 1
        return Batch(
            inputs=torch.where(index < count, tokens, 0),
            targets=torch.where(scored, answers, IGNORE),
            coordinate=(count + 1).expand_as(tokens),
        )

    def _counts(self, generator: torch.Generator, rows: int, shortest: int, longest: int) -> Tensor:
        """Draw n − 1 for each row: int64 [b, 1]."""
        return torch.randint(shortest - 1, longest, (rows, 1), generator=generator)

    def _draw(self, generator: torch.Generator, count: Tensor) -> tuple[Tensor, Tensor]:
        """Draw the tokens [b, t] and the answer after each of them [b, t].

        Positions at or beyond a row's count ([b, 1]) are ignored.
        """
        raise NotImplementedError
