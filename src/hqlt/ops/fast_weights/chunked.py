"""Fast weights over chunks of tokens: matrix products instead of a loop over time.

Let S be the matrix at the start of a chunk (rows: keys), L_i the cumulative sum of log α up to and including the token
of write i, and r_i the correction that write i adds:

    r_i = β_i (v_i − Sᵀ(e^{L_i} ⊙ a_i) − Σ_{j<i} (a_i · (e^{L_i − L_j} ⊙ k_j)) r_j)

With â_i = e^{L_i} ⊙ a_i, q̂_i = e^{L_i} ⊙ q_i, k̂_j = e^{L_end − L_j} ⊙ k_j, and the decayed products with k: G of a
(below the diagonal) and T of q (up to the token's last write):

    (I + βG) R = β(V − Â S)        so        R = U − Y S,   U = (I + βG)⁻¹ βV,   Y = (I + βG)⁻¹ βÂ      (the WY form)
    O = scale · (Q̂ S + T R)                  S' = e^{L_end} ⊙ S + K̂ᵀ R

If nothing is erased, R = βV. Queries and erased keys are stacked as the rows of one matrix X, the readers: each reads
Sᵀ x̂_i and the corrections before it.

Resets mask all of these: tokens of different segments in a chunk do not see each other, tokens after a reset do not see
S, and only the last segment contributes to S'. The backward pass saves only the inputs and recomputes the rest.

The gradient of log α follows from an identity. Adding x to log α_i is equivalent to scaling every q and a from token i
on and S' by e^x, and every such k by e^−x. The gradient at token i is therefore the sum of q ⊙ dq + a ⊙ da − k ⊙ dk
over the rest of its segment in the chunk, plus S' ⊙ dS' if the segment reaches the chunk's end.

Source: Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule over Sequence Length", section 3.2, and
"Gated Delta Networks", section 3.3.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hqlt.ops import contain
from hqlt.ops.backend import register_backend
from hqlt.ops.fast_weights import reference
from hqlt.ops.fast_weights.decayed import by_token, factors, products, products_backward
from hqlt.ops.fast_weights.steps import Decay, Erase, live_writes, writes_per_token
from hqlt.ops.heads import grouped
from hqlt.ops.second_order import Gradients
from hqlt.ops.segments import segment_ids
from hqlt.shapes import Keys, Live, Matrix, Queries, Resets, Strengths, Values, at_least_float32, is_symbolic


@register_backend("fast_weights", "chunked")
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
    t, m = q.shape[1], writes_per_token(q, k)
    c = _chunk_length(t, q.shape[3], m)
    k, v, beta, decay, erase = live_writes(live, k, v, beta, decay, erase)
    k, v, beta, *own = (_by_tokens(x, t, m) for x in (k, v, beta, *([] if isinstance(erase, bool) else [erase])))
    decays = (
        [] if decay is None else [decay.clamp(min=torch.finfo(decay.dtype).min)]
    )  # log 0 must not count as infinite

    def run(*x: Tensor) -> tuple[Tensor, ...]:
        q, k, v, beta, *others, state = x
        decay = others[0] if decays else None
        a = others[-1] if own else None
        out, state, e = _Chunked.apply(q, k, v, beta, decay, a, state, resets, erase is not False, scale, c)
        all_errors.append(e)
        return out, state

    all_errors: list[Tensor] = []
    out, state = contain.scan(run, resets, q, (k, v, beta, *decays, *own), (state,))
    return (out, state, _by_writes(all_errors[0])) if errors else (out, state)


def _chunk_length(t: int, k: int, m: int) -> int:
    """Tokens per chunk, a power of two. Wider keys allow longer chunks: a chunk costs c·c·k within itself and c·k·v for
    the matrix."""
    rows = 16 if k <= 50 else 32 if k <= 64 else 64
    tokens = rows // m if is_symbolic(t) else min(rows // m, 2 * t - 1)
    return 1 << (max(tokens, 1).bit_length() - 1)


def _by_tokens(x: Tensor, t: int, m: int) -> Tensor:
    """[b, m·t, h, …] → [b, t, h, m, …]."""
    return x.unflatten(1, (t, m)).transpose(2, 3)


def _by_writes(x: Tensor) -> Tensor:
    """[b, t, h, m, …] → [b, m·t, h, …]."""
    return x.transpose(2, 3).flatten(1, 2)


class _Masks(NamedTuple):
    """What affects what within a chunk. All but the first are None without resets."""

    reads: Tensor  # corrections that a reader sees [c·r, c·m], with resets [b, 1, n, c·r, c·m]
    reach: Tensor | None  # the same as `reads`
    inverse: Tensor | None  # errors that contribute to a correction [b, 1, n, c·m, c·m]
    visible: Tensor | None  # tokens i and j are of the same segment [b, 1, n, c, c]
    sees_matrix: Tensor | None  # no reset so far in this chunk [b, 1, n, c, 1]
    reaches_end: Tensor | None  # the token is of the chunk's last segment [b, 1, n, c, 1]
    keeps_matrix: Tensor | None  # no reset in this chunk [b, 1, n, 1, 1]


class _Chunks(NamedTuple):
    """The inputs laid out as [b, h, n, rows of the chunk's tokens, ·], and what is computed from them alone."""

    tokens: int  # c
    x: Tensor  # readers [b, h, n, c·r, k]: for each token its g queries, then the m keys that it erases, if any
    k: Tensor  # [b, h, n, c·m, k]
    v: Tensor
    beta: Tensor  # [b, h, n, c·m, 1]
    decay: Tensor | None  # [b, h, n, c, 1 or k]
    since: Tensor | None  # e^L [b, h, n, c, 1 or k]
    until: Tensor | None  # e^(L_end − L)
    whole: Tensor | None  # e^L_end [b, h, n, 1 or k, 1]
    scores: Tensor  # T and G, rows as in x, 0 for corrections that a reader does not see [b, h, n, c·r, c·m]
    inverse: Tensor | None  # (I + βG)⁻¹ [b, h, n, c·m, c·m]; None if nothing is erased
    masks: _Masks

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Split the readers' rows […, c·r, ·] into those of queries […, c·g, ·] and of erased keys […, c·m, ·], if
        any."""
        return _split(x, self.tokens, self.k.shape[-2] // self.tokens if self.inverse is not None else 0)


def _split(x: Tensor, c: int, erased: int) -> tuple[Tensor, Tensor]:
    x = x.unflatten(-2, (c, -1))
    q, a = x.split([x.shape[-2] - erased, erased], dim=-2)
    return q.flatten(-3, -2), a.flatten(-3, -2)


def _joined(q: Tensor, a: Tensor, c: int) -> Tensor:
    """Inverse of `_split`."""
    return torch.cat([x.unflatten(-2, (c, -1)) for x in (q, a)], dim=-2).flatten(-3, -2)


def _to_chunks(c: int, *tensors: Tensor) -> Tensor:
    """Tensors [b, t, h, r, ·] → [b, h, n, c·r, ·], the rows of a token adjacent, in at least float32. The last chunk is
    padded with zeros, which write nothing."""
    missing = -tensors[0].shape[1] % c
    padded = (F.pad(x, (0, 0, 0, 0, 0, 0, 0, missing)) if missing else x for x in tensors)
    chunks = [x.to(at_least_float32(x.dtype)).unflatten(1, (-1, c)).movedim(3, 1) for x in padded]
    return (torch.cat(chunks, dim=-2) if len(chunks) > 1 else chunks[0].contiguous()).flatten(3, 4)


def _from_chunks(x: Tensor, c: int, t: int) -> Tensor:
    """[b, h, n, c·r, ·] → [b, t, h, r, ·]."""
    return x.unflatten(-2, (c, -1)).movedim(1, 3).flatten(1, 2)[:, :t]


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """x where the mask is True, else 0. (Multiplying by 0 would keep NaN and infinity.)"""
    if mask is None:
        return x
    if mask.shape[-2] not in (1, x.shape[-2]):
        mask = mask.repeat_interleave(x.shape[-2] // mask.shape[-2], dim=-2)
    return x.masked_fill(~mask, 0)


def _within(weights: Tensor, x: Tensor, reach: Tensor | None) -> Tensor:
    """weights […, i, j] @ x […, j, ·]. A row of x that has overflowed affects only the rows that see it.

    reach […, i, j]: Which rows see which.
    """
    if reach is None:
        return weights @ x
    lost = ~x.isfinite().all(dim=-1)
    sums = weights @ x.masked_fill(lost[..., None], 0)
    return sums.masked_fill((reach & lost[..., None, :]).any(dim=-1, keepdim=True), torch.nan)


def _part(x: Tensor | None, i: int) -> Tensor | None:
    """The part of x that belongs to chunk i."""
    return None if x is None else x[:, :, i]


def _masks(resets: Tensor | None, c: int, g: int, m: int, erased: int, device: torch.device) -> _Masks:
    before = torch.arange(m, device=device)[:erased]  # number of its own token's writes that a reader sees
    before = torch.cat([before.new_full((g,), m), before]) + m * torch.arange(c, device=device)[:, None]
    earlier = torch.arange(c * m, device=device) < before.flatten()[:, None]
    if resets is None:
        return _Masks(earlier, None, None, None, None, None, None)
    ids = F.pad(segment_ids(resets), (0, -resets.shape[1] % c), mode="replicate").unflatten(1, (-1, c))[:, None]
    first = F.pad(ids[..., -1], (1, -1))[..., None]  # segment of the matrix at the chunk's start
    last = ids[..., -1:]
    visible = ids[..., :, None] == ids[..., None, :]
    reach = visible.repeat_interleave(g + erased, dim=-2).repeat_interleave(m, dim=-1) & earlier
    inverse = _split(reach, c, erased)[1] | torch.eye(c * m, dtype=torch.bool, device=device) if erased else None
    return _Masks(
        reach, reach, inverse, visible, (ids == first)[..., None], (ids == last)[..., None], (first == last)[..., None]
    )


def _chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor | None,
    a: Tensor | None,
    resets: Tensor | None,
    erases: bool,
    c: int,
) -> _Chunks:
    q = grouped(q, k)
    g, m = q.shape[3], k.shape[3]
    erased = m if erases else 0
    x = _to_chunks(c, q, k if a is None else a) if erases else _to_chunks(c, q)
    k = _split(x, c, m)[1] if erases and a is None else _to_chunks(c, k)
    v, beta = _to_chunks(c, v), _to_chunks(c, beta[..., None])
    if decay is not None:
        decay = _to_chunks(c, (decay if decay.dim() == 4 else decay[..., None])[..., None, :])
    masks = _masks(resets, c, g, m, erased, q.device)
    scores = products(x, k, decay).masked_fill_(~masks.reads, 0)
    inverse = None
    if erased:
        lower = beta * _split(scores, c, erased)[1]
        identity = torch.eye(c * m, dtype=k.dtype, device=k.device)
        inverse = torch.linalg.solve_triangular(
            identity + lower, identity.expand_as(lower), upper=False, unitriangular=True
        )
        inverse = _masked(inverse, masks.inverse)
    return _Chunks(c, x, k, v, beta, decay, *factors(decay), scores, inverse, masks)


class _Scan(NamedTuple):
    corrections: Tensor  # R [b, h, n, c·m, v]
    Y: Tensor | None  # [b, h, n, c·m, k]; None if nothing is erased
    starts: Tensor  # the matrix at the start of each chunk [b, h, n, k, v]
    final: Tensor


def _run(x: _Chunks, state: Tensor) -> _Scan:
    """Loop over chunks."""
    masks, U, Y = x.masks, x.beta * x.v, None
    if x.inverse is not None:
        a = by_token(x.split(x.x)[1], x.since)
        U, Y = x.inverse @ U, x.inverse @ _masked(x.beta * a, masks.sees_matrix)
    k_end = _masked(by_token(x.k, x.until), masks.reaches_end)
    starts, corrections = [], []
    for i in range(x.k.shape[2]):
        starts.append(state)
        R = U[:, :, i]
        if Y is not None:
            R = R - _masked(Y[:, :, i] @ state, _part(masks.sees_matrix, i))
        state = _kept(x, state, i) + k_end[:, :, i].mT @ _masked(R, _part(masks.reaches_end, i))
        corrections.append(R)
    return _Scan(torch.stack(corrections, dim=2), Y, torch.stack(starts, dim=2), state)


def _kept(x: _Chunks, state: Tensor, i: int) -> Tensor:
    """A matrix decayed (or reset) over chunk i; likewise a gradient, in the backward pass."""
    kept = _masked(state, _part(x.masks.keeps_matrix, i))
    return kept if x.whole is None else x.whole[:, :, i] * kept


def _read(x: _Chunks, scan: _Scan, which: int) -> Tensor:
    """The reads of the queries (which = 0) or the erased keys (1): X̂ S plus the corrections before them."""
    rows, scores = (x.split(y)[which] for y in (x.x, x.scores))
    reach = None if x.masks.reach is None else x.split(x.masks.reach)[which]
    held = _masked(by_token(rows, x.since) @ scan.starts, x.masks.sees_matrix)
    return held + _within(scores, scan.corrections, reach)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        decay: Tensor | None,
        a: Tensor | None,
        state: Tensor,
        resets: Tensor | None,
        erases: bool,
        scale: float,
        c: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q is [b, t, g·h, k]; k, v, β and a are [b, t, h, m, …]. a is None if k itself or nothing is erased.

        Returns the output, the final matrix and the errors [b, t, h, m, v].
        """
        ctx.save_for_backward(q, k, v, beta, decay, a, state, resets)
        ctx.erases, ctx.scale, ctx.c = erases, scale, c
        x = _chunks(q, k, v, beta, decay, a, resets, erases, c)
        scan = _run(x, state)
        t = q.shape[1]
        error = x.v if x.inverse is None else x.v - _read(x, scan, 1)
        error = _from_chunks(error, c, t)
        ctx.mark_non_differentiable(error)
        return _from_chunks(scale * _read(x, scan, 0), c, t).flatten(2, 3), scan.final, error

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, d_final: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, resets = ctx.saved_tensors
        present = [x is not None for x in inputs]

        def all_inputs(tensors: Any) -> list[Any]:
            remaining = iter(tensors)
            return [next(remaining) if here else None for here in present]

        def gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
            *tensors_in, d_out, d_final = tensors
            grads = _gradients(all_inputs(tensors_in), d_out, d_final, resets, ctx.erases, ctx.scale, ctx.c)
            return tuple(x for x in grads if x is not None)

        def equation(*tensors_in: Tensor) -> tuple[Tensor, Tensor]:
            q, *written, decay, a, state = all_inputs(tensors_in)
            k, v, beta = (_by_writes(x) for x in written)
            erase, scale = ctx.erases if a is None else _by_writes(a), ctx.scale
            return reference.fast_weights(
                q, k, v, beta, decay, erase, scale=scale, state=state, resets=resets, live=None
            )

        tensors = (*(x for x in inputs if x is not None), d_out, d_final)
        if torch.is_grad_enabled():
            grads = Gradients.apply(gradients, equation, len(tensors) - 2, *tensors)
        else:
            grads = gradients(*tensors)
        return *all_inputs(grads), None, None, None, None


def _gradients(
    inputs: list[Any], d_out: Tensor, d_final: Tensor, resets: Tensor | None, erases: bool, scale: float, c: int
) -> tuple[Tensor | None, ...]:
    """Returns the gradients of q, k, v, β, log α, a and the initial state."""
    q, k, v, beta, decay, a, state = inputs
    x = _chunks(q, k, v, beta, decay, a, resets, erases, c)
    scan, masks = _run(x, state), x.masks
    R, S = scan.corrections, scan.starts
    dO = scale * _to_chunks(c, grouped(d_out, v))
    dR, dS_after, dS = _loop_backward(x, scan.Y, dO, d_final)

    # R = (I + βG)⁻¹ β(V − Â S), or βV. With dE the gradient of β(…), the reads of the erased keys have the gradient −β
    # dE.
    dE, error = dR, x.v
    if x.inverse is not None:
        dE = _within(x.inverse.mT, dR, None if masks.inverse is None else masks.inverse.mT)
        error = x.v - _read(x, scan, 1)
    dv = x.beta * dE
    d_read = dO if x.inverse is None else _joined(dO, -dv, c)
    dx, dk = products_backward((d_read @ R.mT).masked_fill_(~masks.reads, 0), x.x, x.k, x.decay)
    dx = dx + by_token(_masked(d_read @ S.mT, masks.sees_matrix), x.since)
    dk = dk + by_token(_masked(R @ dS_after.mT, masks.reaches_end), x.until)
    dq, da = x.split(dx)
    d_decay = dq if x.decay is None else _decay_gradient(x, scan, dx, dk, dS_after)
    if erases and a is None:
        dk = dk + da
    d_beta = (dE * error).sum(-1, keepdim=True)
    with_inputs = ((dq, q), (dk, k), (dv, v), (d_beta, beta), (d_decay, decay), (da, a))
    grads = (
        None if like is None else _from_chunks(y, c, q.shape[1]).reshape(like.shape).to(like.dtype)
        for y, like in with_inputs
    )
    return *grads, dS


def _loop_backward(x: _Chunks, Y: Tensor | None, dO: Tensor, dS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The loop over chunks in reverse.

    Returns:
        dR, the gradients of the matrix after each chunk, and the gradient of the initial matrix.
    """
    masks, scores, q = x.masks, x.split(x.scores)[0], x.split(x.x)[0]
    dR_read = scores.mT @ dO
    dS_read = _masked(by_token(q, x.since), masks.sees_matrix).mT @ dO
    k_end = by_token(x.k, x.until)
    dRs: list[Tensor] = []
    dS_afters: list[Tensor] = []
    for i in reversed(range(x.k.shape[2])):
        dS_afters.append(dS)
        dRs.append(dR_read[:, :, i] + _masked(k_end[:, :, i] @ dS, _part(masks.reaches_end, i)))
        dS = _kept(x, dS, i) + dS_read[:, :, i]
        if Y is not None:
            dS = dS - Y[:, :, i].mT @ _masked(dRs[-1], _part(masks.sees_matrix, i))
    return torch.stack(dRs[::-1], dim=2), torch.stack(dS_afters[::-1], dim=2), dS


def _decay_gradient(x: _Chunks, scan: _Scan, dx: Tensor, dk: Tensor, dS_after: Tensor) -> Tensor:
    """Gradient of log α: [b, h, n, c, 1 or k]."""
    c, masks = x.tokens, x.masks
    after = torch.cat([scan.starts[:, :, 1:], scan.final[:, :, None]], dim=2)
    own = (x.x * dx).unflatten(-2, (c, -1)).sum(-2) - (x.k * dk).unflatten(-2, (c, -1)).sum(-2)
    end = (after * dS_after).sum(-1)[..., None, :]
    if x.decay is not None and x.decay.shape[-1] == 1:
        own, end = own.sum(-1, keepdim=True), end.sum(-1, keepdim=True)
    rest = None if masks.visible is None else masks.visible.triu()
    later = own.new_ones(c, c).triu() if rest is None else rest.to(own.dtype)
    return _within(later, own, rest) + _masked(end.expand_as(own), masks.reaches_end)
