"""Recall by a tracked state: the key is never shown. It needs both memories at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from hqlt.task.task import IGNORE, Batch, Split


@dataclass(frozen=True, kw_only=True)
class StateRecall:
    """Switches are flipped in a long walk; then every setting of theirs gets a value; then more flips, and after each
    the value of the setting that they are in.

        two switches         the walk    the value of each setting            flips
        what is flipped       01 11      11 → e   00 → c   10 → d   01 → f    01 10
        setting               01 10                                           11 01
        inputs                 2  4       8 13     5 11     7 12     6 14      2  3
        targets                ·  ·       ·  ·     ·  ·     ·  ·     ·  ·     13 14    (labels "prefix": 6 7 · …)

    With m = 2^switches settings and as many kinds of flips (one of them flips nothing): token 1 + flip, 1 + m +
    setting, 1 + 2m + value. 0 fills up rows on the right. The values of a row differ.

    Why both memories are needed. *A window alone* sees the last L·(S − 1) + 1 tokens with L layers. If one flip of the
    walk lies before them, the setting is uniform over all m given all it sees, and as the values differ, no guess is
    right more often than 1 in m. *A state alone* follows the setting, two reflections for each switch, but must
    keep m pairs that came once: more than the width of a head's matrix cannot be told apart in it. Together, the
    FW-memory says where we are, and the KV-memory what is there, if the pairs and the flips fit into its window.
    """

    switches: int = 4
    values: int = 32
    """Different values that there are, at least as many as settings."""
    questions: int = 16
    """Flips after the pairs."""
    train_lengths: tuple[int, int] = (3, 40)
    """Least and greatest length of the walk in training."""
    test_lengths: tuple[int, int] = (40, 256)
    """Least and greatest length of the walk in validation and test."""
    labels: Literal["answer", "prefix"] = "answer"
    """What training scores: the answers alone, or after every flip of the walk the setting as well."""

    name = "state-recall"
    metric: Literal["accuracy"] = "accuracy"
    coordinate_name = "length of the walk"

    def __post_init__(self) -> None:
        if self.switches < 1 or self.questions < 1:
            raise ValueError(
                f"switches, questions: expected at least 1 of each, got {self.switches} and {self.questions}"
            )
        if self.values < self.settings:
            raise ValueError(
                f"values: expected at least {self.settings}, one for each setting of {self.switches} switches, "
                f"got {self.values}"
            )
        if self.labels not in ("answer", "prefix"):
            raise ValueError(f"labels: expected 'answer' or 'prefix', got {self.labels!r}")
        for name, lengths in (("train_lengths", self.train_lengths), ("test_lengths", self.test_lengths)):
            if len(lengths) != 2 or not 1 <= lengths[0] <= lengths[1]:
                raise ValueError(f"{name}: expected the least and the greatest length, 1 or more, got {lengths}")

    @property
    def settings(self) -> int:
        """m"""
        return 2**self.switches

    @property
    def vocab_size(self) -> int:
        return 1 + 2 * self.settings + self.values

    @property
    def chance(self) -> float:
        return 1 / self.values

    def sample(self, generator: torch.Generator, rows: int, split: Split) -> Batch:
        shortest, longest = self.train_lengths if split == "train" else self.test_lengths
        m = self.settings
        walk = torch.randint(shortest, longest + 1, (rows, 1), generator=generator)
        flips = torch.randint(0, m, (rows, int(walk.max()) + self.questions), generator=generator)
        bits = flips[..., None] >> torch.arange(self.switches) & 1
        setting = (bits.cumsum(dim=1) % 2 << torch.arange(self.switches)).sum(dim=2)

        order = torch.rand(rows, m, generator=generator).argsort(dim=1)
        value = torch.rand(rows, self.values, generator=generator).argsort(dim=1)[:, :m]
        pairs = torch.stack([1 + m + order, 1 + 2 * m + value.gather(1, order)], dim=2).flatten(1)

        inputs = torch.zeros(rows, flips.shape[1] + 2 * m, dtype=torch.long)
        walking = torch.arange(flips.shape[1]) < walk
        inputs[:, : flips.shape[1]] = torch.where(walking, 1 + flips, 0)
        inputs.scatter_(1, walk + torch.arange(2 * m), pairs)
        question = walk + torch.arange(self.questions)
        asked = question + 2 * m
        inputs.scatter_(1, asked, 1 + flips.gather(1, question))
        targets = torch.full_like(inputs, IGNORE)
        if split == "train" and self.labels == "prefix":
            targets[:, : flips.shape[1]] = torch.where(walking, 1 + m + setting, IGNORE)
        targets.scatter_(1, asked, 1 + 2 * m + value.gather(1, setting.gather(1, question)))
        return Batch(
            inputs=inputs,
            targets=targets,
            coordinate=walk.expand_as(inputs),
        )
