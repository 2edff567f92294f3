"""Linear attention as its equation, token by token: the oracle of its faster twins."""

from __future__ import annotations

import torch

from hqlt.ops.linear_attention.state import EPSILON, LinearState
from hqlt.shapes import Keys, Queries, Resets, Values, at_least_float32


def linear_attention(
    q: Queries, k: Keys, v: Values, *, state: LinearState, resets: Resets | None
) -> tuple[Values, LinearState]:
    W, z = state
    q, k, v = (x.to(at_least_float32(x.dtype)) for x in (q, k, v))
    reads = []
    for t in range(q.shape[1]):
        if resets is not None:
            W = W.masked_fill(resets[:, t, None, None, None], 0)
            z = z.masked_fill(resets[:, t, None, None], 0)
        W = W + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        z = z + k[:, t]
        weight = torch.einsum("bhk,bhk->bh", z, q[:, t])
        reads.append(torch.einsum("bhkv,bhk->bhv", W, q[:, t]) / (weight + EPSILON)[..., None])
    return torch.stack(reads, dim=1), LinearState(W, z)
