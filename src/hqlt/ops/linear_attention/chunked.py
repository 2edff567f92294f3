"""Linear attention over chunks of tokens.

A column of ones appended to the values makes the normalizer one more value: W' = [W, z]. In a chunk that begins with
    W', the sums are Q W' + tril(Q Kᵀ) [V, 1], and the next chunk begins with W' + Kᵀ [V, 1]. Resets mask all of these.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from hqlt.ops import contain
from hqlt.ops.backend import register_backend
from hqlt.ops.heads import grouped, product
from hqlt.ops.linear_attention.state import EPSILON, LinearState
from hqlt.ops.segments import segment_ids, written
from hqlt.shapes import Keys, KeySum, Live, Matrix, Queries, Resets, Values, at_least_float32

CHUNK = 64


@register_backend("linear_attention", "chunked")
def linear_attention(
    q: Queries, k: Keys, v: Values, *, state: LinearState, resets: Resets | None, live: Live | None
) -> tuple[Values, LinearState]:
    out, *after = contain.scan(partial(_run, resets=resets), resets, q, written(live, k, v), state)
    return out, LinearState(*after)


def _run(
    q: Queries, k: Keys, v: Values, matrix: Matrix, key_sum: KeySum, resets: Resets | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the output, the final matrix and the final key sum."""
    q, k, v = (x.to(at_least_float32(x.dtype)).movedim(1, -2) for x in (grouped(q, k), k, v))  # [b, h, (g,) t, ·]
    v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
    W = torch.cat([matrix, key_sum[..., None]], dim=-1)
    ids = None if resets is None else F.pad(segment_ids(resets), (1, 0))  # first 0: the segment of the initial state
    sums = []
    for i in range(0, q.shape[-2], CHUNK):
        qc, kc, vc = (x[..., i : i + CHUNK, :] for x in (q, k, v))
        attention, held = product(qc, kc.mT).tril(), product(qc, W)
        if ids is not None:
            before, own = ids[:, None, i, None], ids[:, None, i + 1 : i + 1 + CHUNK]
            attention = attention.masked_fill((own[..., :, None] != own[..., None, :])[:, :, None], 0)
            held = held.masked_fill((own != before)[:, :, None, :, None], 0)
            kc = kc.masked_fill((own != own[..., -1:])[..., None], 0)
        sums.append(held + product(attention, vc))
        if ids is not None:
            W = W.masked_fill((own[..., -1:] != before)[..., None], 0)
        W = W + kc.mT @ vc
    total = torch.cat(sums, dim=-2).movedim(-2, 1).flatten(2, 3)
    return total[..., :-1] / (total[..., -1:] + EPSILON), W[..., :-1], W[..., -1]
