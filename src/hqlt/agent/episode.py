"""Episodes, and batches of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_map

from hqlt.agent.core import Inputs
from hqlt.agent.observation import Tree


class Outcome(NamedTuple):
    """Summary of an episode."""

    total: float
    """Undiscounted return."""
    length: int
    """Number of steps."""
    success: float
    """0 or 1; NaN if the environment does not report success."""


class Episode(NamedTuple):
    """One episode: t steps and t + 1 observations."""

    observations: Tree
    """[t + 1, ...] with the dtype of the environment's space, or a dictionary or tuple of such arrays."""
    actions: NDArray[np.int64]
    """[t]."""
    rewards: NDArray[np.float32]
    """[t]."""
    terminated: bool
    """False if the episode was truncated."""
    success: float
    """0 or 1; NaN if the environment does not report success."""

    @property
    def length(self) -> int:
        """Number of steps t."""
        return len(self.actions)

    @property
    def outcome(self) -> Outcome:
        """Return, length and success."""
        return Outcome(float(self.rewards.sum(dtype=np.float64)), self.length, self.success)


class Batch(NamedTuple):
    """Episodes as rows, padded on the right."""

    observations: Tree
    """[b, t + 1, ...], or a dictionary or tuple of such tensors."""
    actions: Tensor
    """[b, t] int64."""
    rewards: Tensor
    """[b, t]."""
    terminated: Tensor
    """Bool [b, t], True at the last step of an episode that terminated."""
    mask: Tensor
    """Bool [b, t], True at the steps that were played, False at padding."""

    @staticmethod
    def from_episodes(episodes: Sequence[Episode]) -> Batch:
        """Stack episodes, padded to the longest one."""
        b, t = len(episodes), max(episode.length for episode in episodes)
        observations = tree_map(
            lambda *rows: np.stack([padded(row, t + 1) for row in rows]),
            *(episode.observations for episode in episodes),
        )
        actions = np.zeros((b, t), dtype=np.int64)
        rewards = np.zeros((b, t), dtype=np.float32)
        terminated, mask = np.zeros((2, b, t), dtype=bool)
        for row, episode in enumerate(episodes):
            n = episode.length
            actions[row, :n] = episode.actions
            rewards[row, :n] = episode.rewards
            terminated[row, n - 1] = episode.terminated
            mask[row, :n] = True
        return Batch(*tree_map(torch.from_numpy, (observations, actions, rewards, terminated, mask)))

    def to(self, device: torch.device) -> Batch:
        """Move all tensors to a device."""
        return tree_map(lambda x: x.to(device), self)

    def inputs(self) -> Inputs:
        """Return the inputs of the core at each of the t + 1 observations."""
        resets = F.pad(torch.zeros_like(self.mask), (1, 0))
        resets[:, 0] = True
        return Inputs(self.observations, F.pad(self.actions, (1, 0), value=-1), F.pad(self.rewards, (1, 0)), resets)


def padded(x: NDArray[Any], length: int) -> NDArray[Any]:
    """Pad with zeros behind, to this length of the first axis."""
    filled = np.zeros((length, *x.shape[1:]), dtype=x.dtype)
    filled[: len(x)] = x
    return filled
