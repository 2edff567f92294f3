"""A shuffled order that needs no table."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from hqlt.seeds import GAMMA, mix64

ROUNDS = 8


def permute(index: NDArray[np.int64], size: int, key: int) -> NDArray[np.int64]:
    """Where each index in [0, size) goes under the permutation of [0, size) that the key names.

    A Feistel network on the pairs (l, r) with index = l·b + r, a = ⌈√size⌉, b = ⌈size / a⌉:

        l ← l + f_{2i}(r) mod a,    r ← r + f_{2i+1}(l) mod b,    i = 0 … ROUNDS − 1

    Each line can be undone, so the whole is a bijection of [0, a·b). What lands beyond the size goes through once more,
    until it lands within (cycle walking), which is seldom, as a·b − size < a.
    """
    a = max(math.isqrt(max(size - 1, 0)) + 1, 1)
    b = -(-size // a)
    out = index.astype(np.uint64)
    outside = np.ones(out.shape, dtype=bool)
    while outside.any():
        l, r = np.divmod(out[outside], np.uint64(b))
        for i in range(ROUNDS):
            l = (l + _hashed(r, key, 2 * i) % np.uint64(a)) % np.uint64(a)
            r = (r + _hashed(l, key, 2 * i + 1) % np.uint64(b)) % np.uint64(b)
        out[outside] = l * np.uint64(b) + r
        outside = out >= size
    return out.astype(np.int64)


def _hashed(x: NDArray[np.uint64], key: int, line: int) -> NDArray[np.uint64]:
    """Of x, the key and the number of the line."""
    return mix64(x + np.uint64((key + (line + 1) * int(GAMMA)) % 2**64))
