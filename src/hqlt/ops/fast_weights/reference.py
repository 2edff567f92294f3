"""Fast weights as their equation, write by write. Every other implementation is tested against it."""

from __future__ import annotations

from typing import Any

import torch

from hqlt.ops.backend import register_backend
from hqlt.ops.fast_weights.steps import Decay, Erase, live_writes, writes_per_token
from hqlt.ops.heads import grouped
from hqlt.shapes import Keys, Live, Matrix, Queries, Resets, Strengths, Values, at_least_float32


@register_backend("fast_weights", "reference")
def fast_weights(
    q: Queries,
    k: Keys,
    v: Values,
    beta: Strengths,
    decay: Decay | None,
    erase: Erase,
    *,
    scale: float,
    state: Matrix,
    resets: Resets | None,
    live: Live | None,
    errors: bool = False,
) -> tuple[Any, ...]:
    S, m = state, writes_per_token(q, k)
    k, v, beta, decay, erase = live_writes(live, k, v, beta, decay, erase)
    q, k, v, beta = (x.to(at_least_float32(x.dtype)) for x in (grouped(q, k), k, v, beta))
    a = k if erase is True else None if erase is False else erase.to(k.dtype)
    if decay is not None:
        decay = decay.to(at_least_float32(decay.dtype)).view(*decay.shape, *(1,) * (5 - decay.dim()))
    reads, all_errors = [], []
    for t in range(q.shape[1]):
        if resets is not None:
            S = S.masked_fill(resets[:, t, None, None, None], 0)
        S_t = S if decay is None else decay[:, t].exp() * S
        for i in range(m * t, m * t + m):
            error = v[:, i] if a is None else v[:, i] - torch.einsum("bhkv,bhk->bhv", S_t, a[:, i])
            S_t = S_t + torch.einsum("bhk,bhv->bhkv", k[:, i], beta[:, i, :, None] * error)
            all_errors.append(error.detach())
        S = S_t if live is None else torch.where(live[:, t, None, None, None], S_t, S)
        reads.append(scale * torch.einsum("bhkv,bhgk->bhgv", S, q[:, t]))
    out = torch.stack(reads, dim=1).flatten(2, 3)
    return (out, S, torch.stack(all_errors, dim=1)) if errors else (out, S)
