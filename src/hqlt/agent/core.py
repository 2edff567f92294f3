"""The core that actor and critics share: an encoder, then a memory."""

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
    """What the core reads, for a sequence [b, t] or for a single step [b]."""

    observation: Tree
    """[b, t, ...], or a dictionary or tuple of such tensors."""
    previous_action: Tensor
    """[b, t] int64; −1 at the first step of an episode."""
    previous_reward: Tensor
    """[b, t]; 0 at the first step of an episode."""
    resets: Tensor
    """Bool [b, t]: True at the first step of an episode."""

    def to(self, device: torch.device) -> Inputs:
        """Move all tensors to a device."""
        return tree_map(lambda x: x.to(device), self)


class Core(nn.Module):
    """features, state = memory(encoder(inputs), state).

    Args:
        encoder: from observation, previous action and previous reward to vectors [..., d].
        memory: the sequence model of width d.

    Example:
        >>> import hqlt.agent as agents
        >>> envs = agents.make_worlds("TMazePassive", 4, seed=0)
        >>> memory = agents.build_memory("lstm", hidden_size=8)
        >>> encoder = agents.build_encoder(envs.single_observation_space, envs.single_action_space, 8)
        >>> len(agents.Core(encoder, memory).init_state(rows=4))
        2
    """

    def __init__(self, encoder: Encoder, memory: MemoryModel) -> None:
        super().__init__()
        self.encoder = encoder
        self.memory = memory

    def init_state(self, rows: int) -> State:
        """Return an empty memory for each row."""
        return self.memory.init_state(rows)

    def step(self, inputs: Inputs, state: State) -> tuple[Tensor, State]:
        """Process one step; returns features [b, d] and the next state."""
        return self.memory.step(self.encode(inputs), state, inputs.resets)

    def sequence(self, inputs: Inputs, state: State) -> tuple[Hidden, State]:
        """Process t steps; returns features [b, t, d] and the next state."""
        return self.memory.sequence(self.encode(inputs), state, inputs.resets)

    def encode(self, inputs: Inputs) -> Tensor:
        """Return the memory's input [..., d]."""
        return self.encoder(inputs.observation, inputs.previous_action, inputs.previous_reward)


def mlp(inputs: int, widths: tuple[int, ...], outputs: int) -> nn.Sequential:
    """Build a multilayer perceptron with ReLU between its linear layers."""
    sizes = [inputs, *widths]
    hidden = [part for i, o in pairwise(sizes) for part in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(sizes[-1], outputs))
