"""Random numbers for many copies at once: each copy has a stream of its own, and none is drawn in a Python loop."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from hqlt.seeds import GAMMA, mix64

Indices: TypeAlias = NDArray[np.intp]
"""Which env_ids, [m]."""


class Streams:
    """SplitMix64, n generators side by side: state ← state + γ, and what is drawn is mix64(state).

    Copy i's stream follows from seed + i alone, so it is the same among any number of copies.

    Source: Steele, Lea, Flood 2014, "Fast Splittable Pseudorandom Number Generators", figure 16.
    """

    def __init__(self, n: int) -> None:
        self.state = np.zeros(n, np.uint64)

    def seed(self, env_ids: Indices, seed: int) -> None:
        """Begin anew: copy i with seed + i."""
        self.state[env_ids] = mix64(np.uint64(seed % 2**64) + env_ids.astype(np.uint64))

    def bits(self, env_ids: Indices, count: int) -> NDArray[np.uint64]:
        """[m, count] 64 bits each."""
        drawn = self.state[env_ids, None] + np.arange(1, count + 1, dtype=np.uint64) * GAMMA
        self.state[env_ids] = drawn[:, -1]
        return mix64(drawn)

    def below(self, env_ids: Indices, k: int) -> Indices:
        """[m] of 0 … k − 1, each as likely as the others (to within k / 2⁶⁴)."""
        return (self.bits(env_ids, 1)[:, 0] % np.uint64(k)).astype(np.intp)

    def order(self, env_ids: Indices, k: int) -> Indices:
        """[m, k] the numbers 0 … k − 1 in an order in which all are as likely."""
        return self.bits(env_ids, k).argsort(axis=1)
