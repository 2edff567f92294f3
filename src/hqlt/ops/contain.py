"""NaN and infinity stay within reach, for implementations that multiply by masks.

0 · NaN is NaN, so a mask that is multiplied, or a weight of 0 in a product of matrices, lets it through to tokens that
cannot see it. Here an implementation is given zeros in place of the rows that are not finite, forward and backward, and
what can see one of them is made NaN afterwards.

Queries of a group count as one row: where one of them is not finite, none of their reads is.

Everything lies on a timeline: index i sees low_i … i, where low never falls. For a scan over t tokens, its initial
state comes before the first and its final state after the last.
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
"""A tensor [b, n, h, …], and where on the timeline its n rows lie."""


def scan(
    run: Callable[..., tuple[Tensor, ...]],
    resets: Resets | None,
    q: Tensor,
    written: Sequence[Tensor],
    states: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """`run(q, *written, *states)` → (out, *states after it), contained by resets."""
    if resets is None:
        return run(q, *written, *states)
    marks = F.pad(resets, (1, 1))
    low = torch.where(marks, torch.arange(marks.shape[1], device=marks.device), 0).cummax(dim=1).values
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
    """`run(q, k, v)` → out, contained by resets and, where there are resets, by the window."""
    if resets is None:
        return run(q, k, v)
    index = torch.arange(resets.shape[1], device=resets.device)
    low = torch.where(resets, index, 0).cummax(dim=1).values.maximum(index - (window - 1))
    everything, own = slice(None), slice(k.shape[1] - q.shape[1], None)

    def run_placed(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
        return (grouped(run(q.flatten(2, 3), k, v), k),)

    placed = [(k, everything), (v, everything)]
    return _contained(run_placed, low, (grouped(q, k), own), placed, [own])[0].flatten(2, 3)


def _contained(
    run: Callable[..., tuple[Tensor, ...]], low: Tensor, q: Placed, written: list[Placed], outputs: list[slice]
) -> tuple[Tensor, ...]:
    nobody = low.new_zeros(*low.shape, q[0].shape[2], dtype=torch.bool)
    sick = _marked(nobody, [q]) | _seen(_marked(nobody, written), low)
    given = [q, *written]
    clean = [x.masked_fill(_over(~_finite(x), x), 0) for x, _ in given]
    places = outputs, [place for _, place in given]
    return _Contain.apply(low, sick, places, *run(*clean), *(x for x, _ in given))


class _Contain(torch.autograd.Function):
    """Outputs → outputs, NaN where sick. Backward it is the inputs within reach of a sick gradient that become NaN."""

    @staticmethod
    def forward(
        ctx: Any, low: Tensor, sick: Tensor, places: tuple[list[slice], list[slice]], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(low, sick)
        ctx.places = places
        outputs, inputs = tensors[: len(places[0])], tensors[len(places[0]) :]
        ctx.like = [(x.shape, x.dtype) for x in inputs]
        return tuple(
            x.masked_fill(_over(sick[:, place], x), torch.nan) for x, place in zip(outputs, places[0], strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Any, ...]:
        low, sick = ctx.saved_tensors
        out_places, in_places = ctx.places
        sick = sick | _marked(torch.zeros_like(sick), list(zip(d_outputs, out_places, strict=True)))
        clean = [d.masked_fill(_over(sick[:, place], d), 0) for d, place in zip(d_outputs, out_places, strict=True)]
        reached = _sees(sick, low)
        lost = []
        for number, (place, (shape, dtype)) in enumerate(zip(in_places, ctx.like, strict=True)):
            marks = (reached if number else sick)[:, place]  # q, the first, is seen by itself alone
            zero = torch.where(marks, torch.nan, 0.0).to(dtype)
            lost.append(zero.view(*zero.shape, *(1,) * (len(shape) - 3)).expand(shape))
        return None, None, None, *clean, *lost


def _finite(x: Tensor) -> Tensor:
    """Bool[b, n, h] of [b, n, h, …]: whether all of a row's numbers are finite."""
    finite = x.isfinite()
    return finite if x.dim() == 3 else finite.flatten(3).all(dim=-1)


def _over(marks: Tensor, x: Tensor) -> Tensor:
    """Bool[b, n, h] as a mask for x [b, n, h, …]."""
    return marks.view(*marks.shape, *(1,) * (x.dim() - 3))


def _marked(nobody: Tensor, placed: list[Placed]) -> Tensor:
    """Where on the timeline something is not finite: Bool[b, T, h]."""
    marks = nobody.clone()
    for x, place in placed:
        marks[:, place] |= ~_finite(x)
    return marks


def _counts(marks: Tensor) -> Tensor:
    """How many are marked before each index: [b, T + 1, h]."""
    return F.pad(marks.long().cumsum(dim=1), (0, 0, 1, 0))


def _at(counts: Tensor, index: Tensor) -> Tensor:
    return counts.gather(1, index[..., None].expand(-1, -1, counts.shape[2]))


def _seen(marks: Tensor, low: Tensor) -> Tensor:
    """Which indices see a marked one."""
    counts = _counts(marks)
    return counts[:, 1:] > _at(counts, low)


def _sees(marks: Tensor, low: Tensor) -> Tensor:
    """Which indices a marked one sees."""
    counts = _counts(marks)
    index = torch.arange(low.shape[1], device=low.device).expand(low.shape)
    end = torch.searchsorted(low.contiguous(), index.contiguous(), right=True)  # those before it see the index
    return _at(counts, end) > counts[:, :-1]
