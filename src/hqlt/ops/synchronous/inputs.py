from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from hqlt.ops.window_attention.beyond import Beyond
from hqlt.shapes import Keys, Matrix, Queries, Resets, Strengths, Values


class Inputs(NamedTuple):
    """Arguments of every implementation of `hqlt.ops.synchronous`, after shapes were checked and defaults filled in."""

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
    beyond: Beyond | None = None
