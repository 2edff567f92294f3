"""What tasks share that are trained on short sequences and tested on long ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hqlt.registry import check_choice
from hqlt.task.task import IGNORE, Batch, Split, Task


@dataclass(frozen=True, kw_only=True)
class Growing(Task):
    """Sequences of a random length n, uniform between a least and a greatest one, another in training than in tests."""

    train_lengths: tuple[int, int] = (3, 40)
    """Least and greatest n in training."""
    test_lengths: tuple[int, int] = (40, 256)
    """Least and greatest n in validation and test."""
    labels: Literal["answer", "prefix"] = "answer"
    """What training scores: the answer alone, or after every token the answer so far. Tests score the answer alone."""

    shortest = 1
    """The least n that there is."""
    coordinate_name = "length"

    def __post_init__(self) -> None:
        for name, lengths in (("train_lengths", self.train_lengths), ("test_lengths", self.test_lengths)):
            if len(lengths) != 2 or not self.shortest <= lengths[0] <= lengths[1]:
                raise ValueError(
                    f"{name}: expected the least and the greatest length, {self.shortest} or more, got {lengths}"
                )
        check_choice("labels", self.labels, ("answer", "prefix"))

    def lengths(self, split: Split) -> tuple[int, int]:
        return self.train_lengths if split == "train" else self.test_lengths

    def scores_prefixes(self, split: Split) -> bool:
        return split == "train" and self.labels == "prefix"


@dataclass(frozen=True, kw_only=True)
class StateTracking(Growing):
    """n − 1 tokens, and at the last of them an answer that depends on all. Trained on short sequences, tested on long.

    n, the length with the answer counted, is uniform; rows are filled up with token 0 on the right.

    Source: Delétang et al. 2023, "Neural Networks and the Chomsky Hierarchy"; lengths as in the paper, section 4.2.
    """

    shortest = 3

    def sample(self, generator: torch.Generator, rows: int, split: Split) -> Batch:
        count = self._counts(generator, rows, *self.lengths(split))
        tokens, answers = self._draw(generator, count)
        index = torch.arange(tokens.shape[1])
        asked = index < count if self.scores_prefixes(split) else index == count - 1
        return Batch(
            inputs=torch.where(index < count, tokens, 0),
            targets=torch.where(asked, answers, IGNORE),
            coordinate=(count + 1).expand_as(tokens),
        )

    def _counts(self, generator: torch.Generator, rows: int, shortest: int, longest: int) -> Tensor:
        """n − 1 for each row, [b, 1]."""
        return torch.randint(shortest - 1, longest, (rows, 1), generator=generator)

    def _draw(self, generator: torch.Generator, count: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and, after each of them, the answer so far, [b, t] both; right up to each row's count [b, 1]."""
        raise NotImplementedError
