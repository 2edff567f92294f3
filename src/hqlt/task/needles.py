"""Needles in noise: a few key–value pairs in a long sequence of other tokens, all queried at its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hqlt.registry import register
from hqlt.task.task import IGNORE, Batch, Split, Task


@register("task", "needles")
@dataclass(frozen=True, kw_only=True)
class Needles(Task):
    """Find key–value pairs (needles) in noise and predict the value of each key at its query.

    Keys are drawn without repetition, values and noise with repetition; the three sets of tokens are disjoint.

        two needles in 10 tokens, keys 1–4, values 5–8, noise 9–12      queries in random order
        inputs    9 12 3 6 10 10 9 1 8 11                               1 0 3 0
        targets   · ·  · · ·  ·  · · · ·                                8 · 6 ·

    Token 0 follows each query. A plain window has lost the needles by then; a memory that keeps entries beyond its
    window must tell needles from noise.

    Source:
        After Kamradt 2023, "Needle in a haystack", with noise instead of text.
    """

    keys: int = 16
    """Number of key tokens."""
    values: int = 16
    """Number of value tokens."""
    noise: int = 32
    """Number of noise tokens."""
    needles: int = 4
    """Number of pairs in a sequence."""
    train_lengths: Sequence[int] = (64, 128, 256)
    """Number of tokens before the queries in training; each batch draws one length."""
    test_lengths: Sequence[int] = (256, 512, 1024, 2048)
    """The same in validation and test: equally many sequences of each length, the shorter ones padded with 0."""

    def __post_init__(self) -> None:
        if not 1 <= self.needles <= self.keys:
            raise ValueError(f"needles: expected 1 to {self.keys}, the number of keys, got {self.needles}")
        for name, least in (("values", 2), ("noise", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least} tokens, got {getattr(self, name)}")
        for name, lengths in (("train_lengths", self.train_lengths), ("test_lengths", self.test_lengths)):
            if not lengths or min(lengths) < 2 * self.needles:
                raise ValueError(
                    f"{name}: expected lengths of at least {2 * self.needles} tokens, two per needle, "
                    f"got {list(lengths)}"
                )

    @property
    def vocab_size(self) -> int:
        return 1 + self.keys + self.values + self.noise

    @property
    def chance(self) -> float:
        return 1 / self.values

    @property
    def coordinate_name(self) -> str:
        return "tokens between needle and question"

    def sample(self, generator: torch.Generator, rows: int, split: Split) -> Batch:
        if split == "train":
            length = self.train_lengths[int(torch.randint(len(self.train_lengths), (), generator=generator))]
            return self._sequences(generator, rows, length, length)
        longest = max(self.test_lengths)
        each = [len(part) for part in torch.arange(rows).tensor_split(len(self.test_lengths))]
        parts = [
            self._sequences(generator, n, length, longest)[:3]
            for n, length in zip(each, self.test_lengths, strict=True)
        ]
        return Batch(*map(torch.cat, zip(*parts, strict=True)))

    def _sequences(self, generator: torch.Generator, rows: int, length: int, longest: int) -> Batch:
        n, begin = self.needles, 1 + self.keys
        keys = 1 + torch.rand(rows, self.keys, generator=generator).argsort(dim=1)[:, :n]
        values = torch.randint(begin, begin + self.values, (rows, n), generator=generator)
        inputs = torch.zeros(rows, longest + 2 * n, dtype=torch.long)
        inputs[:, :length] = torch.randint(begin + self.values, self.vocab_size, (rows, length), generator=generator)
        # n sorted places out of length − n, each shifted by the number of values before it, so that none overlap.
        place = torch.rand(rows, length - n, generator=generator).argsort(dim=1)[:, :n].sort(dim=1).values
        place = place + torch.arange(n)
        inputs.scatter_(1, place, keys).scatter_(1, place + 1, values)
        order = torch.rand(rows, n, generator=generator).argsort(dim=1)
        where = (length + 2 * torch.arange(n)).expand(rows, n)
        inputs.scatter_(1, where, keys.gather(1, order))
        distance = where - (place + 1).gather(1, order)
        return Batch(
            inputs=inputs,
            targets=torch.full_like(inputs, IGNORE).scatter_(1, where, values.gather(1, order)),
            coordinate=torch.zeros_like(inputs).scatter_(1, where, distance),
        )
