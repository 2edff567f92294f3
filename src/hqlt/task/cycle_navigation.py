"""Cycle navigation: where on a ring do the moves end?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hqlt.registry import register
from hqlt.task.state_tracking import StateTracking

MOVES = (0, 1, -1)


@register("task", "cycle")
@dataclass(frozen=True, kw_only=True)
class CycleNavigation(StateTracking):
    """Predict the position on a ring after n − 1 moves of 0, +1 or −1, starting from position 0.

        moves      −1 −1  0 +1
        position    5  4  4  5
        inputs      3  3  1  2    (1 for 0, 2 for +1, 3 for −1)
        targets     ·  ·  ·  9    (position + 4; labels "prefix": 9 8 8 9)

    Source:
        Delétang et al. 2023, "Neural Networks and the Chomsky Hierarchy", appendix A; six positions as in the paper.
    """

    positions: int = 6
    """Number of positions on the ring."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.positions < 2:
            raise ValueError(f"positions: expected at least 2, got {self.positions}")

    @property
    def vocab_size(self) -> int:
        return 1 + len(MOVES) + self.positions

    @property
    def chance(self) -> float:
        return 1 / self.positions

    def _draw(self, generator: torch.Generator, count: Tensor) -> tuple[Tensor, Tensor]:
        move = torch.randint(0, len(MOVES), (len(count), int(count.max())), generator=generator)
        position = torch.tensor(MOVES)[move].cumsum(dim=1) % self.positions
        return move + 1, position + 1 + len(MOVES)
