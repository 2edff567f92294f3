from __future__ import annotations

from typing import NamedTuple

from hqlt.shapes import KeySum, Matrix

EPSILON = 1e-10
"""Added to the normaliser, so that an empty memory reads as zero."""


class LinearState(NamedTuple):
    matrix: Matrix
    key_sum: KeySum
