"""Multi-query associative recall: many pairs, then every key is asked for once. It needs a precise memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from hqlt.task.task import IGNORE, Batch, Split


@dataclass(frozen=True, kw_only=True)
class AssociativeRecall:
    """Keys are drawn without repetition from the lower half of the vocabulary, values from the upper half.

        two pairs of vocabulary 8       the keys asked for, at gaps drawn by a power law
        inputs    3 5 1 6               1 0 3 0 0 0
        targets   · · · ·               6 · 5 · · ·

    Token 0 fills the gaps, and is no key.

    Source: Arora et al. 2023, "Zoology: Measuring and Improving Recall in Efficient Language Models", section 3.
    """

    vocabulary: int = 8192
    pairs: int = 64
    """Pairs of a sequence in validation and test."""
    train_pairs: tuple[int, ...] = (4, 8, 16, 32, 64)
    """Pairs in training: each batch draws one of these. Few pairs teach what many cannot begin to."""
    tokens_per_pair: int = 4
    """A sequence's length by its pairs: two tokens for each pair, the rest for the queries and the gaps."""
    power: float = 0.01
    """The gap after the pairs has a density ∝ gap^(power − 1): most keys are asked for soon."""

    name = "recall"
    metric: Literal["accuracy"] = "accuracy"
    coordinate_name = "tokens between pair and query"

    def __post_init__(self) -> None:
        if self.tokens_per_pair < 4:
            raise ValueError(
                f"tokens_per_pair: expected at least 4, two for the pair and two for its query, "
                f"got {self.tokens_per_pair}"
            )
        most = self.vocabulary // 2 - 1
        for name, pairs in (("pairs", self.pairs), *(("train_pairs", pairs) for pairs in self.train_pairs)):
            if not 1 <= pairs <= most:
                raise ValueError(
                    f"{name}: expected 1 to {most}, the keys of a vocabulary of {self.vocabulary}, got {pairs}"
                )

    @property
    def vocab_size(self) -> int:
        return self.vocabulary

    @property
    def chance(self) -> float:
        return 1 / (self.vocabulary - self.vocabulary // 2)

    def sample(self, generator: torch.Generator, rows: int, split: Split) -> Batch:
        """A training batch of fewer pairs has as many more rows, so that it asks for as many values."""
        n = self.pairs
        if split == "train":
            n = self.train_pairs[int(torch.randint(len(self.train_pairs), (), generator=generator))]
            rows = rows * self.pairs // n
        return self._sequences(generator, rows, n)

    def _sequences(self, generator: torch.Generator, rows: int, n: int) -> Batch:
        half, t = self.vocabulary // 2, n * self.tokens_per_pair
        keys = 1 + torch.rand(rows, half - 1, generator=generator).argsort(dim=1)[:, :n]
        values = torch.randint(half, self.vocabulary, (rows, n), generator=generator)
        slots = (t - 2 * n) // 2
        density = torch.arange(1, slots + 1, dtype=torch.float64) ** (self.power - 1)
        slot = torch.multinomial(density.expand(rows, slots), n, generator=generator)  # without repetition
        where = 2 * n + 2 * slot

        inputs = torch.zeros(rows, t, dtype=torch.long)
        inputs[:, : 2 * n] = torch.stack([keys, values], dim=2).flatten(1)
        inputs.scatter_(1, where, keys)
        distance = where - (2 * torch.arange(n) + 1)
        return Batch(
            inputs=inputs,
            targets=torch.full_like(inputs, IGNORE).scatter_(1, where, values),
            coordinate=torch.zeros_like(inputs).scatter_(1, where, distance),
        )
