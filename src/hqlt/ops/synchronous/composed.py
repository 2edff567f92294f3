"""A synchronous layer's memories, mixer and norm from the fastest operation for each: what a layer does by itself."""

from __future__ import annotations

from torch import Tensor

from hqlt.ops.delta_rule import delta_rule
from hqlt.ops.features import rotated, unit_silu
from hqlt.ops.norm import mix
from hqlt.ops.window_attention import window_attention
from hqlt.shapes import Keys, Matrix, Queries, Resets, Strengths, Values


def synchronous(
    q: Queries,
    k: Keys,
    v: Values,
    beta: Strengths,
    gate: Values,
    norm_weight: Tensor,
    *,
    window: int,
    rotary: tuple[Tensor, Tensor] | None,
    norm_eps: float,
    scale: float,
    state: Matrix,
    resets: Resets | None,
) -> tuple[Values, Matrix]:
    t, l = q.shape[1], k.shape[1]
    own = slice(l - t, l)
    own_resets = None if resets is None else resets[:, own]
    fw, matrix = delta_rule(
        unit_silu(q), unit_silu(k[:, own]), v[:, own], beta, scale=scale, state=state, resets=own_resets
    )
    if rotary is not None:
        cos, sin = (table[:l] for table in rotary)
        q, k = rotated(q, cos[own], sin[own]), rotated(k, cos, sin)
    kv = window_attention(q, k, v, window=window, scale=scale, resets=resets)
    return mix(fw, kv, gate, norm_weight, eps=norm_eps), matrix
