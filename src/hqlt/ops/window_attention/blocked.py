"""Window attention over blocks of queries, in time linear in the length.

A block of c queries reads, as a view, the c + window − 1 keys that end with its last token. Per block, with scores set
to −∞ outside the window and the segment,

    P = softmax(scale · Q Kᵀ)    O = P V    dV = Pᵀ dO    dP = dO Vᵀ    dA = P ∘ (dP − rowsum(dP ∘ P))

and dQ = scale · dA K, dK = scale · dAᵀ Q. The backward pass saves only q, k and v, and recomputes P.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hqlt.ops import contain
from hqlt.ops.backend import register_backend
from hqlt.ops.heads import grouped, product, sum_of_products
from hqlt.ops.second_order import Equation, Gradients
from hqlt.ops.window_attention import blocked_beyond, reference
from hqlt.ops.window_attention.beyond import Beyond
from hqlt.ops.window_attention.dense import visible
from hqlt.shapes import Keys, Queries, Resets, Values, at_least_float32


@register_backend("window_attention", "blocked")
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
        return blocked_beyond.window_attention(q, k, v, window=window, scale=scale, resets=resets, beyond=beyond)

    def run(q: Queries, k: Keys, v: Values) -> Values:
        return _BlockedWindowAttention.apply(q, k, v, window, scale, resets)

    return contain.attention(run, resets, window, q, k, v)


def _heads_first(x: Tensor) -> Tensor:
    """[b, t, h, (g,) ·] → contiguous [b, h, (g,) t, ·] in at least float32, so that matmul takes time slices as
    views."""
    return x.to(at_least_float32(x.dtype)).movedim(1, -2).contiguous()


def _blocks(
    t: int, l: int, window: int, resets: Tensor | None, device: torch.device
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yields, for each block, its queries, the keys that they can see, and the mask [·, 1, (1,) c, c + window − 1]."""
    c = max(64, min(window, 256))
    for begin in range(0, t, c):
        end = min(begin + c, t)
        first_key = max(l - t + begin - window + 1, 0)
        keys = slice(first_key, l - t + end)
        block_resets = None if resets is None else resets[:, keys]
        mask = visible(end - begin, keys.stop - keys.start, window, block_resets, device).unsqueeze(-3)
        yield slice(begin, end), keys, mask


def _weights(q: Tensor, k: Tensor, scale: float, mask: Tensor) -> Tensor:
    return (scale * product(q, k.mT)).masked_fill_(~mask, -torch.inf).softmax(dim=-1)


class _BlockedWindowAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, window: int, scale: float, resets: Tensor | None) -> Tensor:
        ctx.save_for_backward(q, k, v, resets)
        ctx.window, ctx.scale = window, scale
        Q, K, V = (_heads_first(x) for x in (grouped(q, k), k, v))
        out = torch.empty(*Q.shape[:-1], V.shape[3], dtype=V.dtype, device=V.device)
        for queries, keys, mask in _blocks(q.shape[1], K.shape[2], window, resets, q.device):
            P = _weights(Q[..., queries, :], K[:, :, keys], scale, mask)
            out[..., queries, :] = product(P, V[:, :, keys])
        return out.movedim(-2, 1).flatten(2, 3).to(q.dtype)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, resets = ctx.saved_tensors
        options = {"window": ctx.window, "scale": ctx.scale, "resets": resets}
        gradients: Equation = partial(_gradients, **options)
        if not torch.is_grad_enabled():
            return *gradients(q, k, v, d_out), None, None, None
        equation = partial(reference.window_attention, **options)
        return *Gradients.apply(gradients, equation, 3, q, k, v, d_out), None, None, None


def _gradients(
    q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, *, window: int, scale: float, resets: Tensor | None
) -> tuple[Tensor, ...]:
    """Returns dq, dk and dv."""
    Q, K, V, dO = (_heads_first(x) for x in (grouped(q, k), k, v, grouped(d_out, v)))
    dQ, dK, dV = torch.empty_like(Q), torch.zeros_like(K), torch.zeros_like(V)
    for queries, keys, mask in _blocks(q.shape[1], K.shape[2], window, resets, q.device):
        Qb, Kb, Vb, dOb = Q[..., queries, :], K[:, :, keys], V[:, :, keys], dO[..., queries, :]
        P = _weights(Qb, Kb, scale, mask)
        dP = product(dOb, Vb.mT)
        dA = scale * P * (dP - (dP * P).sum(dim=-1, keepdim=True))
        dQ[..., queries, :] = product(dA, Kb)
        dK[:, :, keys] += sum_of_products(dA, Qb)
        dV[:, :, keys] += sum_of_products(P, dOb)
    return tuple(g.movedim(-2, 1).reshape(like.shape).to(like.dtype) for g, like in ((dQ, q), (dK, k), (dV, v)))
