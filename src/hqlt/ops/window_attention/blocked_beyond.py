"""Window attention over blocks of queries, with entries that stay visible beyond the window, in time linear in the
length.

A block of c queries reads the c + window − 1 entries that end with its last token, each of which is within the window
of some queries and beyond that of others. It also reads up to `most` older entries, gathered: those that have not
expired when the block begins. After each block, the entries that have left the window are added to the older ones, of
which again at most `most` are still visible.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hqlt.ops import contain
from hqlt.ops.heads import grouped, product
from hqlt.ops.window_attention.beyond import Beyond, lowest
from hqlt.shapes import Keys, Queries, Resets, Values, at_least_float32


def window_attention(
    q: Queries, k: Keys, v: Values, *, window: int, scale: float, resets: Resets | None, beyond: Beyond
) -> Values:
    dtype, t, l = q.dtype, q.shape[1], k.shape[1]
    low = lowest(t, l, window, resets, q.device)[:, None, None, :, None]
    q, k = beyond.joined(q, k)

    def run(q: Queries, k: Keys, v: Values) -> Values:
        return _run(grouped(q, k), k, v, low, window, scale, beyond).to(dtype)

    return contain.attention(run, resets, l, q, k, v)


def _run(q: Queries, k: Keys, v: Values, low: Tensor, window: int, scale: float, beyond: Beyond) -> Values:
    q, k, v = (x.to(at_least_float32(x.dtype)).movedim(1, -2) for x in (q, k, v))
    (q, q_far), (k, k_far) = beyond.split(q), beyond.split(k)
    t, l, c = q.shape[-2], k.shape[-2], max(64, min(window, 256))
    index, expiry = torch.arange(l, device=q.device), beyond.expiry.transpose(1, 2)  # [b, h, l]
    first = max(l - t - window + 1, 0)
    held = _visible(index[:first].expand(*expiry.shape[:2], -1), expiry, l - t, beyond.most)
    reads = []
    for begin in range(0, t, c):
        queries = slice(begin, min(begin + c, t))
        own, starts = index[l - t :][queries, None], low[..., queries, :]
        reach = slice(first, l - t + queries.stop)
        near = index[reach] >= starts
        scores = product(q[..., queries, :], k[..., reach, :].mT)
        if beyond.q is not None:
            scores = torch.where(near, scores, product(q_far[..., queries, :], k_far[..., reach, :].mT))
        far = own < expiry[:, :, None, None, reach]
        scores = scores.masked_fill(~((near | far) & (index[reach] <= own)), -torch.inf)
        keys, values = (_taken(x, held) for x in (k_far, v))
        older = product(q_far[..., queries, :], keys.mT)
        older = older.masked_fill(~(own < expiry.gather(2, held)[:, :, None, None]), -torch.inf)
        P = (scale * torch.cat([older, scores], dim=-1)).softmax(dim=-1)
        n = held.shape[2]
        reads.append(product(P[..., :n], values) + product(P[..., n:], v[..., reach, :]))
        after = max(l - t + queries.stop - window + 1, 0)
        held = torch.cat([held, index[first:after].expand(*held.shape[:2], -1)], dim=2)
        held, first = _visible(held, expiry, l - t + queries.stop, beyond.most), after
    return torch.cat(reads, dim=-2).movedim(-2, 1).flatten(2, 3)


def _visible(held: Tensor, expiry: Tensor, now: int, most: int) -> Tensor:
    """Up to `most` of the entries `held` [b, h, n], including all that are visible at index `now`."""
    visible = expiry.gather(2, held) > now
    return held.gather(2, visible.byte().argsort(dim=2, stable=True)[..., max(held.shape[2] - most, 0) :])


def _taken(x: Tensor, held: Tensor) -> Tensor:
    """x [b, h, l, ·] at held [b, h, n]."""
    return x.gather(2, held[..., None].expand(*held.shape, x.shape[3]))
