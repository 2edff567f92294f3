"""From what an agent meets to what its heads see: an encoder, then a memory. Actor and critics share it."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from hqlt.agent.encoder import Encoder
from hqlt.agent.memory_model import MemoryModel, State
from hqlt.agent.observation import Tree
from hqlt.shapes import Hidden


class Inputs(NamedTuple):
    """What is read at a step. One step of all rows, or [b, t] of them."""

    observation: Tree
    """[b, t, ...], or a dictionary or tuple of such."""
    previous_action: Tensor
    """[b, t] int64; −1 where an episode begins."""
    previous_reward: Tensor
    """[b, t]; 0 where an episode begins."""
    resets: Tensor
    """Bool [b, t]: an episode begins here."""

    def to(self, device: torch.device) -> Inputs:
        return tree_map(lambda x: x.to(device), self)


class Core(nn.Module):
    """features, state = memory(encoder(inputs), state)."""

    def __init__(self, encoder: Encoder, memory: MemoryModel) -> None:
        super().__init__()
        self.encoder = encoder
        self.memory = memory

    def init_state(self, rows: int) -> State:
        return self.memory.init_state(rows)

    def step(self, inputs: Inputs, state: State) -> tuple[Tensor, State]:
        """Inputs of one step → [b, d], state."""
        return self.memory.step(self.encode(inputs), state, inputs.resets)

    def sequence(self, inputs: Inputs, state: State) -> tuple[Hidden, State]:
        """Inputs of t steps → [b, t, d], state."""
        return self.memory.sequence(self.encode(inputs), state, inputs.resets)

    def encode(self, inputs: Inputs) -> Tensor:
        return self.encoder(inputs.observation, inputs.previous_action, inputs.previous_reward)


def mlp(inputs: int, widths: tuple[int, ...], outputs: int) -> nn.Sequential:
    """Linear maps with ReLU between them."""
    sizes = [inputs, *widths]
    hidden = [part for i, o in pairwise(sizes) for part in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(sizes[-1], outputs))
