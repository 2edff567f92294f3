"""Multi-query associative recall: many key–value pairs, then one query for every key. It needs a precise memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from hqlt.registry import register
from hqlt.task.task import IGNORE, Batch, Split, Task


@register("task", "recall")
@dataclass(frozen=True, kw_only=True)
class AssociativeRecall(Task):
    """Read key–value pairs, then predict the value of each key at its query.

    Keys are drawn without repetition from the lower half of the vocabulary, values from the upper half.

        two pairs, vocabulary 8         queries, at gaps from a power law
        inputs    3 5 1 6               1 0 3 0 0 0
        targets   · · · ·               6 · 5 · · ·

    Token 0 fills the gaps and is never a key. The defaults are the settings of zoology.

    Source:
        Arora et al. 2023, "Zoology: Measuring and Improving Recall in Efficient Language Models", section 3; sizes as
        in Arora et al. 2024, "Simple linear attention language models balance the recall-throughput tradeoff".
    """

    vocabulary: int = 8192
    """Number of tokens."""
    train_sizes: Sequence[tuple[int, int]] = ((64, 4), (128, 8), (256, 16), (256, 32), (256, 64))
    """(tokens, pairs) of training sequences; each batch draws one size. Sizes with few pairs help learning to start."""
    test_sizes: Sequence[tuple[int, int]] = (
        (64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256),
    )  # fmt: skip
    """(tokens, pairs) in validation and test: equally many sequences of each size, the shorter ones padded with 0."""
    power: float = 0.01
    """Exponent of the gap between the pairs and a query, with density ∝ gap^(power − 1): most queries come early."""
    against: Literal["distance", "pairs"] = "distance"
    """Coordinate of the scores: the number of tokens between a pair and its query, or the number of pairs."""

    def __post_init__(self) -> None:
        most = self.vocabulary // 2 - 1
        for name, sizes in (("train_sizes", self.train_sizes), ("test_sizes", self.test_sizes)):
            for tokens, pairs in sizes:
                if not 1 <= pairs <= most:
                    raise ValueError(
                        f"{name}: expected 1 to {most} pairs, the keys of a vocabulary of {self.vocabulary}, "
                        f"got {pairs}"
                    )
                if tokens < 4 * pairs:
                    raise ValueError(
                        f"{name}: expected at least 4 tokens per pair, two for the pair and two for its query, got "
                        f"{tokens} for {pairs} pairs"
                    )

    @property
    def vocab_size(self) -> int:
        return self.vocabulary

    @property
    def chance(self) -> float:
        return 1 / (self.vocabulary - self.vocabulary // 2)

    @property
    def coordinate_name(self) -> str:
        return "pairs" if self.against == "pairs" else "tokens between pair and query"

    def sample(self, generator: torch.Generator, rows: int, split: Split) -> Batch:
        """Draw sequences. Training batches with fewer pairs have more rows, so that all have equally many queries."""
        if split == "train":
            tokens, pairs = self.train_sizes[int(torch.randint(len(self.train_sizes), (), generator=generator))]
            rows = rows * max(n for _, n in self.train_sizes) // pairs
            return self._sequences(generator, rows, tokens, pairs, tokens)
        longest = max(tokens for tokens, _ in self.test_sizes)
        each = [len(part) for part in torch.arange(rows).tensor_split(len(self.test_sizes))]
        parts = [
            self._sequences(generator, n, tokens, pairs, longest)[:3]
            for n, (tokens, pairs) in zip(each, self.test_sizes, strict=True)
        ]
        return Batch(*map(torch.cat, zip(*parts, strict=True)))

    def _sequences(self, generator: torch.Generator, rows: int, t: int, n: int, filled: int) -> Batch:
        """Draw sequences of t tokens and n pairs each, padded with 0 to `filled` tokens."""
        half = self.vocabulary // 2
        keys = 1 + torch.rand(rows, half - 1, generator=generator).argsort(dim=1)[:, :n]
        values = torch.randint(half, self.vocabulary, (rows, n), generator=generator)
        slots = (t - 2 * n) // 2
        density = torch.arange(1, slots + 1, dtype=torch.float64) ** (self.power - 1)
        slot = torch.multinomial(density.expand(rows, slots), n, generator=generator)  # without repetition
        where = 2 * n + 2 * slot

        inputs = torch.zeros(rows, filled, dtype=torch.long)
        inputs[:, : 2 * n] = torch.stack([keys, values], dim=2).flatten(1)
        inputs.scatter_(1, where, keys)
        distance = where - (2 * torch.arange(n) + 1)
        coordinate = torch.full_like(where, n) if self.against == "pairs" else distance
        return Batch(
            inputs=inputs,
            targets=torch.full_like(inputs, IGNORE).scatter_(1, where, values),
            coordinate=torch.zeros_like(inputs).scatter_(1, where, coordinate),
        )
