"""Linear attention as its equation, token by token. Every other implementation is tested against it."""

from __future__ import annotations

import torch

from hqlt.ops.backend import register_backend
from hqlt.ops.heads import grouped
from hqlt.ops.linear_attention.state import EPSILON, LinearState
from hqlt.ops.segments import written
from hqlt.shapes import Keys, Live, Queries, Resets, Values, at_least_float32


@register_backend("linear_attention", "reference")
def linear_attention(
    q: Queries, k: Keys, v: Values, *, state: LinearState, resets: Resets | None, live: Live | None
) -> tuple[Values, LinearState]:
    W, z = state
    k, v = written(live, k, v)  # zeros add nothing
    q, k, v = (x.to(at_least_float32(x.dtype)) for x in (grouped(q, k), k, v))
    reads = []
    for t in range(q.shape[1]):
        if resets is not None:
            W = W.masked_fill(resets[:, t, None, None, None], 0)
            z = z.masked_fill(resets[:, t, None, None], 0)
        W = W + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        z = z + k[:, t]
        weight = torch.einsum("bhk,bhgk->bhg", z, q[:, t])
        reads.append(torch.einsum("bhkv,bhgk->bhgv", W, q[:, t]) / (weight + EPSILON)[..., None])
    return torch.stack(reads, dim=1).flatten(2, 3), LinearState(W, z)
