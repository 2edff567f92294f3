"""A synchronous layer's memories, mixer and norm as their equations: the oracle of the faster twins."""

from __future__ import annotations

import torch
from torch import Tensor

from hqlt.ops.delta_rule import delta_rule
from hqlt.ops.features.reference import rotated, unit_silu
from hqlt.ops.window_attention import window_attention
from hqlt.shapes import Keys, Matrix, Queries, Resets, Strengths, Values, at_least_float32


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
    q, k, v, gate, norm_weight = (x.to(at_least_float32(x.dtype)) for x in (q, k, v, gate, norm_weight))
    own = slice(l - t, l)
    fw, matrix = delta_rule(
        unit_silu(q), unit_silu(k[:, own]), v[:, own], beta,
        scale=scale, state=state, resets=None if resets is None else resets[:, own], backend="reference",
    )  # fmt: skip
    if rotary is not None:
        cos, sin = (table[:l] for table in rotary)
        q, k = rotated(q, cos[own], sin[own]), rotated(k, cos, sin)
    kv = window_attention(q, k, v, window=window, scale=scale, resets=resets, backend="reference")
    gamma = gate.sigmoid()
    mix = gamma * fw + (1 - gamma) * kv
    return mix * torch.rsqrt(mix.square().mean(dim=-1, keepdim=True) + norm_eps) * norm_weight, matrix
