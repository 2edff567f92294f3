"""A pseudorandom permutation that needs no table."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from hqlt.seeds import GAMMA, mix64

ROUNDS = 8


def permute(index: NDArray[np.int64], size: int, key: int) -> NDArray[np.int64]:
    """Apply the permutation of [0, size) that belongs to the key to each index.

    A Feistel network on the pairs (l, r) with index = l·b + r, a = ⌈√size⌉, b = ⌈size / a⌉:

        l ← l + f_{2i}(r) mod a,    r ← r + f_{2i+1}(l) mod b,    i = 0 … ROUNDS − 1

    Each step is invertible, so the result is a bijection of [0, a·b). Values outside [0, size) are mapped again until
    they are inside (cycle walking); this is rare because a·b − size < a.
    """
    a = max(math.isqrt(max(size - 1, 0)) + 1, 1)
    b = -(-size // a)
    out = index.astype(np.uint64)
    outside = np.ones(out.shape, dtype=bool)
    while outside.any():
        l, r = np.divmod(out[outside], np.uint64(b))
        for i in range(ROUNDS):
            l = (l + _hash(r, key, 2 * i) % np.uint64(a)) % np.uint64(a)
            r = (r + _hash(l, key, 2 * i + 1) % np.uint64(b)) % np.uint64(b)
        out[outside] = l * np.uint64(b) + r
        outside = out >= size
    return out.astype(np.int64)


def _hash(x: NDArray[np.uint64], key: int, step: int) -> NDArray[np.uint64]:
    """A hash of x, the key and the index of the step."""
    return mix64(x + np.uint64((key + (step + 1) * int(GAMMA)) % 2**64))
