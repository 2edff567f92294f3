"""Episodes: played one by one, learned from as the rows of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from hqlt.agent.core import Inputs


class Outcome(NamedTuple):
    """What an episode came to."""

    total: float
    """Its return, undiscounted."""
    length: int
    """In steps."""
    success: float
    """0 or 1, NaN where the environment says nothing."""


class Episode(NamedTuple):
    """t steps, and the t + 1 observations around them."""

    observations: NDArray[Any]
    """[t + 1, ...], in the dtype that the environment gives."""
    actions: NDArray[np.int64]
    """[t]."""
    rewards: NDArray[np.float32]
    """[t]."""
    terminated: bool
    """False: cut short."""
    success: float
    """0 or 1, NaN where the environment says nothing."""

    @property
    def length(self) -> int:
        return len(self.actions)

    @property
    def outcome(self) -> Outcome:
        return Outcome(float(self.rewards.sum(dtype=np.float64)), self.length, self.success)


class Batch(NamedTuple):
    """Episodes as rows, filled up on the right."""

    observations: Tensor
    """[b, t + 1, ...]."""
    actions: Tensor
    """[b, t] int64."""
    rewards: Tensor
    """[b, t]."""
    terminated: Tensor
    """Bool [b, t]."""
    mask: Tensor
    """Bool [b, t], True at the steps that were played."""

    @staticmethod
    def of(episodes: Sequence[Episode]) -> Batch:
        b, t = len(episodes), max(episode.length for episode in episodes)
        first = episodes[0].observations
        observations = np.zeros((b, t + 1, *first.shape[1:]), dtype=first.dtype)
        actions = np.zeros((b, t), dtype=np.int64)
        rewards = np.zeros((b, t), dtype=np.float32)
        terminated, mask = np.zeros((2, b, t), dtype=bool)
        for row, episode in enumerate(episodes):
            n = episode.length
            observations[row, : n + 1] = episode.observations
            actions[row, :n] = episode.actions
            rewards[row, :n] = episode.rewards
            terminated[row, n - 1] = episode.terminated
            mask[row, :n] = True
        return Batch(*map(torch.from_numpy, (observations, actions, rewards, terminated, mask)))

    def to(self, device: torch.device) -> Batch:
        return Batch(*(x.to(device) for x in self))

    def inputs(self) -> Inputs:
        """What was read at each of the t + 1 observations."""
        resets = torch.zeros(self.observations.shape[:2], dtype=torch.bool, device=self.mask.device)
        resets[:, 0] = True
        return Inputs(self.observations, F.pad(self.actions, (1, 0), value=-1), F.pad(self.rewards, (1, 0)), resets)
