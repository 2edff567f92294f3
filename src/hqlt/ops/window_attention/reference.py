"""Window attention as its equation, token by token. Every other implementation is tested against it."""

from __future__ import annotations

import torch

from hqlt.ops.backend import register_backend
from hqlt.ops.heads import repeated
from hqlt.ops.segments import segment_ids
from hqlt.ops.window_attention.beyond import Beyond, near_and_far
from hqlt.shapes import Keys, Queries, Resets, Values, at_least_float32


@register_backend("window_attention", "reference")
def window_attention(
    q: Queries,
    k: Keys,
    v: Values,
    *,
    window: int,
    scale: float,
    resets: Resets | None,
    beyond: Beyond | None = None,
) -> Values:
    if beyond is not None:
        return _with_beyond(q, k, v, window, scale, resets, beyond)
    dtype = q.dtype
    q, k, v = (x.to(at_least_float32(x.dtype)) for x in (q, *repeated(q, k, v)))
    held = k.shape[1] - q.shape[1]
    ids = None if resets is None else segment_ids(resets)
    reads = []
    for t in range(q.shape[1]):
        now = held + t
        reach = slice(max(now - window + 1, 0), now + 1)
        key, value = k[:, reach], v[:, reach]
        if ids is not None:
            foreign = ids[:, reach] != ids[:, now, None]
            key, value = (x.masked_fill(foreign[..., None, None], 0) for x in (key, value))
        score = scale * torch.einsum("bhk,blhk->bhl", q[:, t], key)
        if ids is not None:
            score = score.masked_fill(foreign[:, None], -torch.inf)
        reads.append(torch.einsum("bhl,blhv->bhv", score.softmax(dim=-1), value))
    return torch.stack(reads, dim=1).to(dtype)


def _with_beyond(
    q: Queries, k: Keys, v: Values, window: int, scale: float, resets: Resets | None, beyond: Beyond
) -> Values:
    near, far = near_and_far(q, k, window, resets, beyond)
    dtype = q.dtype
    q, k = (x.to(at_least_float32(x.dtype)) for x in beyond.joined(q, k))
    (q, q_far), (k, k_far) = beyond.split(q), beyond.split(repeated(q, k)[0])
    (v,) = repeated(q, v.to(at_least_float32(v.dtype)))
    reads = []
    for t in range(q.shape[1]):
        here, there = near[:, :, t], far[:, :, t]
        seen = (here | there).transpose(1, 2)[..., None]
        key, key_far, value = (x.masked_fill(~seen, 0) for x in (k, k_far, v))
        score, score_far = (scale * torch.einsum("bhk,blhk->bhl", x[:, t], y) for x, y in ((q, key), (q_far, key_far)))
        score = torch.where(here, score, score_far).masked_fill(~(here | there), -torch.inf)
        reads.append(torch.einsum("bhl,blhv->bhv", score.softmax(dim=-1), value))
    return torch.stack(reads, dim=1).to(dtype)
