"""Reproducible pseudo-random numbers that depend only on what they are drawn for."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

GAMMA = np.uint64(0x9E3779B97F4A7C15)
"""2⁶⁴ / golden ratio: SplitMix64 is `mix64` of a counter that grows by this."""


def hash64(*parts: object) -> int:
    """Return the first 64 bits of the SHA-256 of the parts, joined by slashes: hash64("train", 0) hashes "train/0"."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:8], "little")


def mix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser: a bijection of 64 bits in which each bit of x flips about half of the output bits.

    Source: Steele, Lea, Flood 2014, "Fast Splittable Pseudorandom Number Generators", figure 16.
    """
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x ^ (x >> np.uint64(31))
