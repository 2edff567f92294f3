"""Parity: is the number of ones odd? The smallest task that requires state tracking."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hqlt.registry import register
from hqlt.task.state_tracking import StateTracking


@register("task", "parity")
@dataclass(frozen=True, kw_only=True)
class Parity(StateTracking):
    """Predict the parity of n − 1 random bits at the last of them.

        bits      1 0 1 1
        inputs    2 1 2 2    (bit + 1)
        targets   · · · 2    (parity + 1; labels "prefix": 2 2 1 2)

    Source:
        Delétang et al. 2023, "Neural Networks and the Chomsky Hierarchy"; the paper, section 4.2, table 2.

    Example:
        >>> from hqlt.task import Parity, generator_for
        >>> task = Parity(train_lengths=(5, 5), labels="prefix")
        >>> batch = task.sample(generator_for("train", seed=0), 2, "train")
        >>> batch.inputs.shape, batch.targets.shape
        (torch.Size([2, 4]), torch.Size([2, 4]))
    """

    vocab_size = 3
    chance = 0.5

    def _draw(self, generator: torch.Generator, count: Tensor) -> tuple[Tensor, Tensor]:
        bits = torch.randint(0, 2, (len(count), int(count.max())), generator=generator)
        return bits + 1, bits.cumsum(dim=1) % 2 + 1
