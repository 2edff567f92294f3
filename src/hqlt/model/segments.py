"""Where segments begin, as Hugging Face says it: masks and positions become resets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hqlt.memory import MemoryState
from hqlt.shapes import Hidden, Positions, Resets, check_resets


class Segments(NamedTuple):
    """How a call's tokens are read: in which order, and where a segment begins in that order."""

    resets: Resets | None
    order: Tensor | None = None  # [b, t] the column that is read at each place; None: as they come
    tokens: Tensor | None = None  # Bool[b, t], the columns that are no padding; None: all
    counts: Tensor | None = None  # [b] tokens of each row, where a row that remembers something has fewer than t

    def sort(self, x: Tensor) -> Tensor:
        """x: [b, t, d], by columns → in the order in which it is read."""
        return x if self.order is None else _take(x, self.order)

    def restore(self, x: Tensor) -> Tensor:
        """The inverse of `sort`."""
        return x if self.order is None else _take(x, self.order.argsort(dim=1))


def read_segments(
    b: int,
    t: int,
    past: int | None,
    attention_mask: Tensor | None = None,
    position_ids: Positions | None = None,
    resets: Resets | None = None,
) -> Segments:
    """Where the segments of t new columns begin, after `past` earlier ones (None: there is no state from before).

    resets: Bool[b, t], begins a segment where True. Without it, position_ids, [b, t] or [1, t], begin one where 0.
    attention_mask: [b, past + t], 0 where padding. A row's first real token begins a segment, and padding is nowhere
    remembered: it is read before the row's real tokens, wherever it stood, or, in a row that remembers tokens, not at
    all (`read_rows`). What a padding token says of itself does not count.

    Raises ValueError for shapes that do not fit.
    """
    resets = segment_starts(b, t, position_ids, resets)
    order = new = counts = None
    if attention_mask is not None:
        real = _check_mask(attention_mask, b, t, past or 0)
        new = real[:, past or 0 :]
        carried = real[:, :past].any(dim=1, keepdim=True) if past else real.new_zeros(b, 1)
        begins = new & (new.cumsum(dim=1) == 1) & ~carried
        resets = begins if resets is None else resets & new | begins
        if _maybe(new[:, 1:] < new[:, :-1]):
            order = new.long().argsort(dim=1, stable=True)
            resets = resets.gather(1, order)
        if past and _maybe(carried & ~new):
            counts = new.sum(dim=1)
            if torch.compiler.is_compiling():
                whole = (counts == 0) | (counts == t) | ~carried[:, 0]
                torch._assert_async(whole.all(), UNEVEN)
    if resets is not None and not _maybe(resets[:, 1:] if past is None else resets):
        resets = None  # the first token of empty memories begins a segment anyway
    return Segments(resets, order, new, counts)


def segment_starts(b: int, t: int, position_ids: Positions | None, resets: Resets | None) -> Resets | None:
    """Where the caller says that segments begin, Bool[b, t]; None: nowhere."""
    check_resets(resets, b, t)
    if resets is not None or position_ids is None:
        return resets
    if position_ids.dim() != 2 or position_ids.shape[0] not in (1, b) or position_ids.shape[1] != t:
        raise ValueError(
            f"position_ids: expected [b, t] = [{b}, {t}] or [1, {t}], the positions of the new tokens, "
            f"got shape {list(position_ids.shape)}"
        )
    return (position_ids == 0).expand(b, t)


UNEVEN = (
    "attention_mask: expected, in compiled code, rows that remember tokens to get new ones in every column or in none, "
    "got padding beside tokens; compile without this call, or give it rows of equal length."
)


def _check_mask(attention_mask: Tensor, b: int, t: int, past: int) -> Tensor:
    if tuple(attention_mask.shape) != (b, past + t):
        seen = f"the {past} tokens in the cache and the {t} new ones" if past else "the tokens"
        raise ValueError(
            f"attention_mask: expected [b, {past + t}], 1 for a token and 0 for padding, over {seen}, with b = {b}; "
            f"got shape {list(attention_mask.shape)}. Leave it out where nothing is padded; packed documents are told "
            f"apart by `resets` or `position_ids`."
        )
    return attention_mask.bool()


def _take(x: Hidden, columns: Tensor) -> Hidden:
    """These columns of each row. (take_along_dim does the same, but not for sizes that torch.export leaves open.)"""
    return x.gather(1, columns[..., None].expand_as(x))


def _maybe(condition: Tensor) -> bool:
    """Whether it holds anywhere. While tracing nobody knows, and yes is always right, if slower."""
    return torch.compiler.is_compiling() or bool(condition.any())


Read = Callable[[Hidden, Resets | None, Sequence[MemoryState]], tuple[list[Hidden], list[MemoryState]]]
"""x [b, t, d], sorted, where segments begin, the states before → hidden states [b, t, d] each, the states after."""


def read_rows(
    read: Read, x: Hidden, segments: Segments, states: Sequence[MemoryState]
) -> tuple[list[Hidden], list[MemoryState]]:
    """`read`, where rows that remember something may have padding: it leaves their memories as they are.

    Rows with as many tokens as each other are read together, each without its padding. The hidden states of padding
    are 0. While tracing, when no one knows which rows these are, all rows are read and those without a token keep
    their states; others are refused (`read_segments`).
    """
    resets, counts, t = segments.resets, segments.counts, x.shape[1]
    if counts is None:
        return read(x, resets, states)
    if torch.compiler.is_compiling():
        hidden, after = read(x, resets, states)
        return hidden, [old.where(counts == 0, new) for old, new in zip(states, after, strict=True)]
    groups, pieces, whole = [], [], [torch.zeros_like(x)]
    for n in counts.unique().tolist():
        rows = (counts == n).nonzero()[:, 0]
        after = [state.select(rows) for state in states]
        if n:
            hidden, after = read(x[rows, t - n :], None if resets is None else resets[rows, t - n :], after)
            whole = [torch.zeros_like(x) for _ in hidden] if len(whole) != len(hidden) else whole
            for out, part in zip(whole, hidden, strict=True):
                out[rows, t - n :] = part
        groups.append(rows)
        pieces.append(after)
    back = torch.cat(groups).argsort()
    return whole, [MemoryState.concatenate(parts).select(back) for parts in zip(*pieces, strict=True)]
