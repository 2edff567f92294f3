"""The delta rule as its equation, token by token: the oracle that every other implementation is tested against."""

from __future__ import annotations

import torch

from hqlt.shapes import Keys, Matrix, Queries, Resets, Strengths, Values, at_least_float32


def delta_rule(
    q: Queries, k: Keys, v: Values, beta: Strengths, *, scale: float, state: Matrix, resets: Resets | None
) -> tuple[Values, Matrix]:
    W = state
    q, k, v, beta = (x.to(at_least_float32(x.dtype)) for x in (q, k, v, beta))
    reads = []
    for t in range(q.shape[1]):
        if resets is not None:
            W = W.masked_fill(resets[:, t, None, None, None], 0)
        predicted = torch.einsum("bhkv,bhk->bhv", W, k[:, t])
        correction = beta[:, t, :, None] * (v[:, t] - predicted)
        W = W + torch.einsum("bhk,bhv->bhkv", k[:, t], correction)
        reads.append(scale * torch.einsum("bhkv,bhk->bhv", W, q[:, t]))
    return torch.stack(reads, dim=1), W
