from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from hqlt.shapes import Keys, Matrix, Queries, Resets, Strengths, Values


class Inputs(NamedTuple):
    """What every implementation of `hqlt.ops.synchronous` is given, shapes and defaults being settled."""

    q: Queries
    k: Keys
    v: Values
    beta: Strengths
    gate: Values
    norm_weight: Tensor
    window: int
    rotary: tuple[Tensor, Tensor] | None
    norm_eps: float
    scale: float
    state: Matrix
    resets: Resets | None
    decay: Strengths | None
