"""Containment of NaN and infinity, for implementations that multiply by masks.

0 · NaN is NaN, so multiplying by a mask, or by a weight of 0 in a matrix product, lets NaN reach tokens that must not
see it. Here, rows that are not finite are replaced by zeros before the implementation runs, forward and backward;
afterwards, every output that can see one of them is set to NaN.

The queries of a group count as one row: if one of them is not finite, all of their outputs become NaN.

All rows are placed on a timeline, on which index i sees low_i … i, with low non-decreasing. In a scan over t tokens,
the initial state comes before the first token and the final state after the last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hqlt.ops.heads import grouped
from hqlt.shapes import Resets

Placed = tuple[Tensor, slice]
"""A tensor [b, n, h, …], and the positions of its n rows on the timeline."""


def scan(
    run: Callable[..., tuple[Tensor, ...]],
    resets: Resets | None,
    q: Tensor,
    written: Sequence[Tensor],
    states: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """Call `run(q, *written, *states)` → (out, *final states), with NaN and infinity contained by resets."""
    if resets is None:
        return run(q, *written, *states)
    marks = F.pad(resets, (1, 1))
    low = segment_begins(marks)
    tokens, begin, end = slice(1, -1), slice(0, 1), slice(-1, None)

    def run_placed(q: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        out, *after = run(q.flatten(2, 3), *others[: len(written)], *(x[:, 0] for x in others[len(written) :]))
        return grouped(out, written[0]), *(x[:, None] for x in after)

    placed = [*((x, tokens) for x in written), *((x[:, None], begin) for x in states)]
    queries = grouped(q, written[0]), tokens
    out, *after = _contained(run_placed, low, queries, placed, [tokens, *(end for _ in states)])
    return out.flatten(2, 3), *(x[:, 0] for x in after)


def attention(
    run: Callable[[Tensor, Tensor, Tensor], Tensor], resets: Resets | None, window: int, q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    """Call `run(q, k, v)` → out, with NaN and infinity contained by resets and, if there are resets, by the window."""
    if resets is None:
        return run(q, k, v)
    index = torch.arange(resets.shape[1], device=resets.device)
    low = segment_begins(resets).maximum(index - (window - 1))
    everything, own = slice(None), slice(k.shape[1] - q.shape[1], None)

    def run_placed(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
        return (grouped(run(q.flatten(2, 3), k, v), k),)

    placed = [(k, everything), (v, everything)]
    return _contained(run_placed, low, (grouped(q, k), own), placed, [own])[0].flatten(2, 3)


def _contained(
    run: Callable[..., tuple[Tensor, ...]], low: Tensor, q: Placed, written: list[Placed], outputs: list[slice]
) -> tuple[Tensor, ...]:
    no_marks = low.new_zeros(*low.shape, q[0].shape[2], dtype=torch.bool)
    lost = _non_finite(no_marks, [q]) | sees_marked(_non_finite(no_marks, written), low)
    inputs = [q, *written]
    clean = [x.masked_fill(_over(~_finite(x), x), 0) for x, _ in inputs]
    places = outputs, [place for _, place in inputs]
    return _Contain.apply(low, lost, places, *run(*clean), *(x for x, _ in inputs))


class _Contain(torch.autograd.Function):
    """Sets lost outputs to NaN. The backward pass sets the gradients of all inputs that a lost output can see to
    NaN."""

    @staticmethod
    def forward(
        ctx: Any, low: Tensor, lost: Tensor, places: tuple[list[slice], list[slice]], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(low, lost)
        ctx.places = places
        outputs, inputs = tensors[: len(places[0])], tensors[len(places[0]) :]
        ctx.like = [(x.shape, x.dtype) for x in inputs]
        return tuple(
            x.masked_fill(_over(lost[:, place], x), torch.nan) for x, place in zip(outputs, places[0], strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Any, ...]:
        low, lost = ctx.saved_tensors
        out_places, in_places = ctx.places
        lost = lost | _non_finite(torch.zeros_like(lost), list(zip(d_outputs, out_places, strict=True)))
        clean = [d.masked_fill(_over(lost[:, place], d), 0) for d, place in zip(d_outputs, out_places, strict=True)]
        reached = seen_by_marked(lost, low)
        d_inputs = []
        for number, (place, (shape, dtype)) in enumerate(zip(in_places, ctx.like, strict=True)):
            marks = (reached if number else lost)[:, place]  # only its own output sees a query, the first input
            zero_or_nan = torch.where(marks, torch.nan, 0.0).to(dtype)
            d_inputs.append(zero_or_nan.view(*zero_or_nan.shape, *(1,) * (len(shape) - 3)).expand(shape))
        return None, None, None, *clean, *d_inputs


def segment_begins(resets: Resets) -> Tensor:
    """The index at which each index's segment begins: [b, T]."""
    index = torch.arange(resets.shape[1], device=resets.device)
    return torch.where(resets, index, 0).cummax(dim=1).values


def _finite(x: Tensor) -> Tensor:
    """Whether all numbers of each row [b, n, h, …] are finite: Bool[b, n, h]."""
    finite = x.isfinite()
    return finite if x.dim() == 3 else finite.flatten(3).all(dim=-1)


def _over(marks: Tensor, x: Tensor) -> Tensor:
    """Marks Bool[b, n, h], reshaped to broadcast over x [b, n, h, …]."""
    return marks.view(*marks.shape, *(1,) * (x.dim() - 3))


def _non_finite(no_marks: Tensor, placed: list[Placed]) -> Tensor:
    """Indices of the timeline at which some row is not finite: Bool[b, T, h]."""
    marks = no_marks.clone()
    for x, place in placed:
        marks[:, place] |= ~_finite(x)
    return marks


def _counts(marks: Tensor) -> Tensor:
    """Number of marks before each index: [b, T + 1, h]."""
    return F.pad(marks.long().cumsum(dim=1), (0, 0, 1, 0))


def _at(counts: Tensor, index: Tensor) -> Tensor:
    return counts.gather(1, index[..., None].expand(-1, -1, counts.shape[2]))


def sees_marked(marks: Tensor, low: Tensor) -> Tensor:
    """Indices that see a marked index."""
    counts = _counts(marks)
    return counts[:, 1:] > _at(counts, low)


def seen_by_marked(marks: Tensor, low: Tensor) -> Tensor:
    """Indices that a marked index sees."""
    counts = _counts(marks)
    index = torch.arange(low.shape[1], device=low.device).expand(low.shape)
    end = torch.searchsorted(low.contiguous(), index.contiguous(), right=True)  # index … end − 1 see the index
    return _at(counts, end) > counts[:, :-1]
