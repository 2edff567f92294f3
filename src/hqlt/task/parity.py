"""Parity: is the number of ones odd? The smallest task that needs a state to be tracked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from hqlt.task.task import IGNORE, Batch, Split


@dataclass(frozen=True, kw_only=True)
class Parity:
    """n − 1 random bits; at the last one, the parity of them all. Trained on short sequences, tested on long ones.

        bits      1 0 1 1
        inputs    2 1 2 2    (bit + 1; 0 pads rows on the right)
        targets   · · · 2    (parity + 1)

    Source: Delétang et al. 2023, "Neural Networks and the Chomsky Hierarchy"; the paper, section 4.2, table 2.
    """

    train_lengths: tuple[int, int] = (3, 40)
    """Least and greatest n in training, the answer counted."""
    test_lengths: tuple[int, int] = (40, 256)
    """Least and greatest n in validation and test."""

    name = "parity"
    vocab_size = 3
    metric: Literal["accuracy"] = "accuracy"
    chance = 0.5
    coordinate_name = "length"

    def sample(self, generator: torch.Generator, rows: int, split: Split) -> Batch:
        shortest, longest = self.train_lengths if split == "train" else self.test_lengths
        count = torch.randint(shortest - 1, longest, (rows, 1), generator=generator)  # bits in each row
        bits = torch.randint(0, 2, (rows, int(count.max())), generator=generator)
        index = torch.arange(bits.shape[1])
        parity = bits.cumsum(dim=1) % 2
        return Batch(
            inputs=torch.where(index < count, bits + 1, 0),
            targets=torch.where(index == count - 1, parity + 1, IGNORE),
            coordinate=(count + 1).expand_as(bits),
        )
