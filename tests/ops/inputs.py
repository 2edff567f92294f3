"""Inputs for tests of the operations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.laws import normal

HEADS, KEY, VALUE = 2, 4, 3  # key width ≠ value width everywhere

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2e-2}
"""Tolerance of outputs by dtype of the inputs, against the reference in float64 on the same numbers."""


def queries(b: int, t: int, seed: int = 0, width: int = KEY, heads: int = HEADS) -> Tensor:
    """Unit vectors, like the output of the delta rule's φ."""
    return F.normalize(normal(b, t, heads, width, seed=seed), dim=-1)


def values(b: int, t: int, seed: int = 0, width: int = VALUE) -> Tensor:
    return normal(b, t, HEADS, width, seed=seed + 10)


def strengths(b: int, t: int) -> Tensor:
    """β in (0, 2)."""
    return 2 * normal(b, t, HEADS, seed=20).sigmoid()


def strided(x: Tensor) -> Tensor:
    """The same numbers in another memory layout, with gaps."""
    gaps = torch.full((*x.shape[::-1], 2), torch.nan, dtype=x.dtype)
    gaps[..., 0] = x.permute(*reversed(range(x.dim())))
    return gaps[..., 0].permute(*reversed(range(x.dim())))
