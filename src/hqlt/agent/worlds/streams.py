"""Random numbers for many environments at once: one stream per environment, without a Python loop."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from hqlt.seeds import GAMMA, mix64

Indices: TypeAlias = NDArray[np.intp]
"""Indices of environments, [m]."""


class RandomStreams:
    """n parallel SplitMix64 generators: state ← state + γ, output mix64(state).

    Stream i depends only on seed + i, not on the number of streams.

    Source:
        Steele, Lea, Flood 2014, "Fast Splittable Pseudorandom Number Generators", figure 16.
    """

    def __init__(self, n: int) -> None:
        self.state = np.zeros(n, np.uint64)

    def seed(self, env_ids: Indices, seed: int) -> None:
        """Seed stream i with seed + i."""
        self.state[env_ids] = mix64(np.uint64(seed % 2**64) + env_ids.astype(np.uint64))

    def bits(self, env_ids: Indices, count: int) -> NDArray[np.uint64]:
        """Draw [m, count] numbers of 64 random bits."""
        drawn = self.state[env_ids, None] + np.arange(1, count + 1, dtype=np.uint64) * GAMMA
        self.state[env_ids] = drawn[:, -1]
        return mix64(drawn)

    def below(self, env_ids: Indices, k: int) -> Indices:
        """Draw [m] numbers uniformly from 0 … k − 1 (up to a bias of k / 2⁶⁴)."""
        return (self.bits(env_ids, 1)[:, 0] % np.uint64(k)).astype(np.intp)

    def order(self, env_ids: Indices, k: int) -> Indices:
        """Draw [m, k] random permutations of 0 … k − 1."""
        return self.bits(env_ids, k).argsort(axis=1)
