"""The delta rule over chunks of tokens: matrix products instead of a loop over time.

Let S be the matrix at the start of a chunk (rows: keys), and r_i the correction that token i of the chunk writes:

    r_i = β_i (v_i − Sᵀk_i − Σ_{j<i} (k_i·k_j) r_j)      so   (I + L) R = β(V − K S),   L = tril(β K Kᵀ, −1)
    R   = U − Y S,      U = (I + L)⁻¹ βV,   Y = (I + L)⁻¹ βK                     (the WY form)
    O   = scale · (Q S + tril(Q Kᵀ) R),     S' = S + Kᵀ R

Resets mask all of these: tokens of different segments in a chunk do not see each other, tokens after a reset do not see
S, and only the last segment contributes to S'. The backward pass saves only the inputs and recomputes the rest.

Source: Yang et al., "Parallelizing Linear Transformers with the Delta Rule over Sequence Length", 2024, section 3.2.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hqlt.ops import contain
from hqlt.ops.backend import register_backend
from hqlt.ops.delta_rule import reference
from hqlt.ops.heads import grouped, product, sum_of_products
from hqlt.ops.second_order import Equation, Gradients
from hqlt.ops.segments import segment_ids, written
from hqlt.shapes import Keys, Live, Matrix, Queries, Resets, Strengths, Values, at_least_float32


@register_backend("delta_rule", "chunked")
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
    def run(*x: Tensor) -> tuple[Tensor, ...]:
        return _ChunkedDeltaRule.apply(*x, resets, scale, _chunk_length(q))

    out, state = contain.scan(run, resets, q, written(live, k, v, beta), (state,))
    return out, state


def _chunk_length(q: Tensor) -> int:
    """Tokens per chunk. Wider keys allow longer chunks: a chunk costs c·c·k within itself and c·k·v for the matrix."""
    t, k = q.shape[1], q.shape[3]
    return min(16 if k <= 50 else 32 if k <= 64 else 64, max(t, 1))


class _Chunks(NamedTuple):
    """The inputs laid out as [b, h, n, c, ·], and what is computed from them alone. Masks are None without resets."""

    q: Tensor  # [b, h, n, g, c, k]
    k: Tensor
    v: Tensor
    beta: Tensor  # [b, h, n, c, 1]
    inverse: Tensor  # (I + L)⁻¹ [b, h, n, c, c]
    attention: Tensor  # tril(Q Kᵀ) [b, h, n, g, c, c]
    visible: Tensor | None  # tokens i and j are of the same segment [b, 1, n, c, c]
    sees_matrix: Tensor | None  # no reset so far in this chunk [b, 1, n, c, 1]
    reaches_end: Tensor | None  # the token is of the chunk's last segment [b, 1, n, c, 1]
    keeps_matrix: Tensor | None  # no reset in this chunk [b, 1, n, 1, 1]


def _to_chunks(x: Tensor, c: int) -> Tensor:
    """[b, t, h, (g,) ·] → [b, h, n, (g,) c, ·], in at least float32. The last chunk is padded with zeros, which write
    nothing."""
    x = F.pad(x.to(at_least_float32(x.dtype)), (*(0, 0) * (x.dim() - 2), 0, -x.shape[1] % c))
    return x.unflatten(1, (-1, c)).movedim(3, 1).movedim(3, -2).contiguous()


def _from_chunks(x: Tensor, t: int) -> Tensor:
    """[b, h, n, (g,) c, ·] → [b, t, h, (g,) ·]."""
    return x.movedim(-2, 3).flatten(2, 3)[:, :, :t].transpose(1, 2)


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """x where the mask is True, else 0. (Multiplying by 0 would keep NaN and infinity.)"""
    return x if mask is None else x.masked_fill(~mask, 0)


def _within(weights: Tensor, x: Tensor, reach: Tensor | None) -> Tensor:
    """weights […, g, c, c] @ x […, c, ·]. A row of x that has overflowed affects only the rows that see it.

    reach […, c, c]: Which rows see which.
    """
    if reach is None:
        return product(weights, x)
    lost = ~x.isfinite().all(dim=-1)
    sums = product(weights, x.masked_fill(lost[..., None], 0))
    return sums.masked_fill((reach & lost[..., None, :]).any(dim=-1)[..., None, :, None], torch.nan)


def _of_queries(mask: Tensor | None) -> Tensor | None:
    """A mask over tokens [b, 1, n, c, ·], with an axis for the query group: [b, 1, n, 1, c, ·]."""
    return None if mask is None else mask[:, :, :, None]


def _part(mask: Tensor | None, i: int) -> Tensor | None:
    """The part of a mask that belongs to chunk i."""
    return None if mask is None else mask[:, :, i]


def _chunks(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, resets: Tensor | None, c: int) -> _Chunks:
    q, k, v, beta = (_to_chunks(x, c) for x in (grouped(q, k), k, v, beta[..., None]))
    visible = sees_matrix = reaches_end = keeps_matrix = None
    if resets is not None:
        ids = F.pad(segment_ids(resets), (0, -resets.shape[1] % c), mode="replicate").unflatten(1, (-1, c))[:, None]
        first = F.pad(ids[..., -1], (1, -1))[..., None]  # segment of the matrix at the chunk's start
        last = ids[..., -1:]
        visible = ids[..., :, None] == ids[..., None, :]
        sees_matrix = (ids == first)[..., None]
        reaches_end = (ids == last)[..., None]
        keeps_matrix = (first == last)[..., None]
    lower = _masked((beta * (k @ k.mT)).tril(-1), visible)
    identity = torch.eye(c, dtype=k.dtype, device=k.device)
    inverse = torch.linalg.solve_triangular(
        identity + lower, identity.expand_as(lower), upper=False, unitriangular=True
    )
    attention = _masked(product(q, k.mT).tril(), _of_queries(visible))
    inverse = _masked(inverse, visible)
    return _Chunks(q, k, v, beta, inverse, attention, visible, sees_matrix, reaches_end, keeps_matrix)


def _run(x: _Chunks, state: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loop over chunks.

    Returns:
        The corrections R [b, h, n, c, v], Y, the matrix at the start of each chunk [b, h, n, k, v], the final matrix.
    """
    U = x.inverse @ (x.beta * x.v)
    Y = x.inverse @ _masked(x.beta * x.k, x.sees_matrix)
    k_end = _masked(x.k, x.reaches_end)
    starts, corrections = [], []
    for i in range(x.k.shape[2]):
        starts.append(state)
        correction = U[:, :, i] - _masked(Y[:, :, i] @ state, _part(x.sees_matrix, i))
        kept = _masked(state, _part(x.keeps_matrix, i))
        state = kept + k_end[:, :, i].mT @ _masked(correction, _part(x.reaches_end, i))
        corrections.append(correction)
    return torch.stack(corrections, dim=2), Y, torch.stack(starts, dim=2), state


class _ChunkedDeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        state: Tensor,
        resets: Tensor | None,
        scale: float,
        c: int,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(q, k, v, beta, state, resets)
        ctx.scale, ctx.c = scale, c
        x = _chunks(q, k, v, beta, resets, c)
        R, _, S, final = _run(x, state)
        earlier = None if x.visible is None else x.visible.tril()
        held = _masked(product(x.q, S), _of_queries(x.sees_matrix))
        out = scale * (held + _within(x.attention, R, earlier))
        return _from_chunks(out, q.shape[1]).flatten(2, 3), final

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, d_final: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, resets = ctx.saved_tensors
        tensors = (*inputs, d_out, d_final)
        gradients: Equation = partial(_gradients, resets=resets, scale=ctx.scale, c=ctx.c)
        if not torch.is_grad_enabled():
            return *gradients(*tensors), None, None, None

        def equation(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
            return reference.delta_rule(q, k, v, beta, scale=ctx.scale, state=state, resets=resets, live=None)

        return *Gradients.apply(gradients, equation, 5, *tensors), None, None, None


def _gradients(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: Tensor, d_out: Tensor, d_final: Tensor,
    *, resets: Tensor | None, scale: float, c: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Returns dq, dk, dv, dβ and the gradient of the initial state."""
    t = q.shape[1]
    x = _chunks(q, k, v, beta, resets, c)
    R, Y, S, _ = _run(x, state)
    dO = scale * _to_chunks(grouped(d_out, v), c)
    sees_matrix, visible = _of_queries(x.sees_matrix), _of_queries(x.visible)

    # The loop over chunks in reverse: dR, and the gradient dS' of the matrix after each chunk.
    dR_read, dS_read = sum_of_products(x.attention, dO), sum_of_products(_masked(x.q, sees_matrix), dO)
    dRs, dS_afters, dS = [], [], d_final
    for i in reversed(range(x.k.shape[2])):
        dS_afters.append(dS)
        dRs.append(dR_read[:, :, i] + _masked(x.k[:, :, i] @ dS, _part(x.reaches_end, i)))
        kept = _masked(dS, _part(x.keeps_matrix, i))
        dS = kept + dS_read[:, :, i] - Y[:, :, i].mT @ _masked(dRs[-1], _part(x.sees_matrix, i))
    dR, dS_after = torch.stack(dRs[::-1], dim=2), torch.stack(dS_afters[::-1], dim=2)

    # R = (I + L)⁻¹ E with E = β(V − K S): dE = (I + L)⁻ᵀ dR and dL = −dE Rᵀ.
    dE = _within(x.inverse.mT[:, :, :, None], dR, None if x.visible is None else x.visible.triu())[:, :, :, 0]
    dL = _masked(-(dE @ R.mT).tril(-1), x.visible)
    d_attention = _masked(product(dO, R.mT).tril(), visible)
    error = x.v - _masked(x.k @ S, x.sees_matrix)
    gram = x.k @ x.k.mT
    d_beta = (dE * error).sum(-1) + (dL * gram).sum(-1)
    dG = x.beta * dL
    dq = _masked(product(dO, S.mT), sees_matrix) + product(d_attention, x.k)
    dk = (
        sum_of_products(d_attention, x.q)
        + (dG + dG.mT) @ x.k
        + _masked(R @ dS_after.mT, x.reaches_end)
        - _masked(x.beta * (dE @ S.mT), x.sees_matrix)
    )
    dv = x.beta * dE
    grads = (_from_chunks(g, t).reshape(like.shape).to(like.dtype) for g, like in ((dq, q), (dk, k), (dv, v)))
    return *grads, _from_chunks(d_beta[..., None], t)[..., 0].to(beta.dtype), dS
