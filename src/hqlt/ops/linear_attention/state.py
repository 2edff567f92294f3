from __future__ import annotations

from typing import NamedTuple

from hqlt.shapes import KeySum, Matrix

EPSILON = 1e-10
"""Added to the normalizer, so that reading an empty memory gives zero."""


class LinearState(NamedTuple):
    """State of linear attention, in at least float32."""

    matrix: Matrix
    """[b, h, k, v]: the sum of φk ⊗ v."""
    key_sum: KeySum
    """[b, h, k]: the sum of φk, the normalizer."""
