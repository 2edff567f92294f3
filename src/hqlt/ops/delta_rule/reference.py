"""The delta rule as its equation, token by token. Every other implementation is tested against it."""

from __future__ import annotations

import torch

from hqlt.ops.backend import register_backend
from hqlt.ops.heads import grouped
from hqlt.ops.segments import written
from hqlt.shapes import Keys, Live, Matrix, Queries, Resets, Strengths, Values, at_least_float32


@register_backend("delta_rule", "reference")
def delta_rule(
    q: Queries,
    k: Keys,
    v: Values,
    beta: Strengths,
    *,
    scale: float,
    state: Matrix,
    resets: Resets | None,
    live: Live | None,
) -> tuple[Values, Matrix]:
    W = state
    k, v, beta = written(live, k, v, beta)
    q, k, v, beta = (x.to(at_least_float32(x.dtype)) for x in (grouped(q, k), k, v, beta))
    reads = []
    for t in range(q.shape[1]):
        if resets is not None:
            W = W.masked_fill(resets[:, t, None, None, None], 0)
        predicted = torch.einsum("bhkv,bhk->bhv", W, k[:, t])
        correction = beta[:, t, :, None] * (v[:, t] - predicted)
        W_t = W + torch.einsum("bhk,bhv->bhkv", k[:, t], correction)
        W = W_t if live is None else torch.where(live[:, t, None, None, None], W_t, W)
        reads.append(scale * torch.einsum("bhkv,bhgk->bhgv", W, q[:, t]))
    return torch.stack(reads, dim=1).flatten(2, 3), W
