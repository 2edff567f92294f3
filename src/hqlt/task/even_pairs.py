"""Even pairs: does a string of two letters switch between them an even number of times? It needs no counting."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hqlt.registry import register
from hqlt.task.state_tracking import StateTracking


@register("task", "even-pairs")
@dataclass(frozen=True, kw_only=True)
class EvenPairs(StateTracking):
    """Given n − 1 letters a and b, predict whether the number of pairs ab and ba is even.

    The number is even exactly if the last letter equals the first.

        letters   a b b a b    (pairs ab, ba, ab: three)
        inputs    1 2 2 1 2
        targets   · · · · 2    (1 even, 2 odd; labels "prefix": 1 2 2 1 2)

    Source:
        Delétang et al. 2023, "Neural Networks and the Chomsky Hierarchy", appendix A.
    """

    vocab_size = 3
    chance = 0.5

    def _draw(self, generator: torch.Generator, count: Tensor) -> tuple[Tensor, Tensor]:
        letters = torch.randint(0, 2, (len(count), int(count.max())), generator=generator)
        return letters + 1, (letters != letters[:, :1]).long() + 1
