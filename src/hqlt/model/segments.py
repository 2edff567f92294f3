"""Conversion of attention masks and position ids to resets, which mark where segments begin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hqlt.memory import MemoryState
from hqlt.shapes import Hidden, Positions, Resets, check_resets


class Segments(NamedTuple):
    """The order in which the columns of a call are read, and where segments begin in that order."""

    resets: Resets | None
    order: Tensor | None = None  # [b, t] column that is read at each step; None: in the given order
    tokens: Tensor | None = None  # Bool[b, t], False for padding; None: no padding
    counts: Tensor | None = None  # [b] tokens per row; None unless a row with a non-empty memory has padding

    def sort(self, x: Tensor) -> Tensor:
        """Reorder the columns of x, [b, t, d], into the order in which they are read."""
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
    """Find where the segments of t new columns begin, and how to skip padding.

    The first token of a row begins a segment. Padding never enters a memory: in a row with an empty memory it is read
    before the row's tokens, whatever its column; in a row with a non-empty memory it is not read at all (`read_rows`).
    Resets and positions of padding are ignored.

    Args:
        b: number of rows.
        t: number of new columns.
        past: number of columns that the cache has read. None: there is no state yet.
        attention_mask ([b, past + t]): 1 for a token, 0 for padding.
        position_ids ([b, t] or [1, t]): a segment begins where it is 0. Used only without resets.
        resets (bool, [b, t]): a segment begins where it is True.

    Raises:
        ValueError: when shapes do not match.
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
        resets = None  # a segment begins at the first token of an empty memory anyway
    return Segments(resets, order, new, counts)


def segment_starts(b: int, t: int, position_ids: Positions | None, resets: Resets | None) -> Resets | None:
    """Bool[b, t], True where resets or position_ids begin a segment; None if neither is given."""
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
    "attention_mask: expected, in compiled code, each row with a non-empty memory to have only tokens or only padding, "
    "got both; exclude this call from compilation, or pass rows of equal length."
)


def _check_mask(attention_mask: Tensor, b: int, t: int, past: int) -> Tensor:
    if tuple(attention_mask.shape) != (b, past + t):
        seen = f"the {past} tokens in the cache and the {t} new ones" if past else "the tokens"
        raise ValueError(
            f"attention_mask: expected [b, {past + t}], 1 for a token and 0 for padding, over {seen}, with b = {b}; "
            f"got shape {list(attention_mask.shape)}. Omit it if nothing is padded; mark packed documents by `resets` "
            f"or `position_ids`."
        )
    return attention_mask.bool()


def _take(x: Hidden, columns: Tensor) -> Hidden:
    """Gather these columns of each row. take_along_dim would not support the dynamic sizes of torch.export."""
    return x.gather(1, columns[..., None].expand_as(x))


def _maybe(condition: Tensor) -> bool:
    """Whether the condition may hold anywhere. While tracing this is unknown, and True is always correct, if slower."""
    return torch.compiler.is_compiling() or bool(condition.any())


Read = Callable[[Hidden, Resets | None, Sequence[MemoryState]], tuple[list[Hidden], list[MemoryState]]]
"""(sorted x [b, t, d], resets, states before) → (hidden states, [b, t, d] each, states after)"""


def read_rows(
    read: Read, x: Hidden, segments: Segments, states: Sequence[MemoryState]
) -> tuple[list[Hidden], list[MemoryState]]:
    """Call `read` so that padding does not change the memories of rows with a non-empty memory.

    Rows with the same number of tokens are read together, without their padding. The hidden states of padding are 0.
    While tracing, these rows are unknown: all rows are read, and those without any token keep their states. Those with
    both tokens and padding then raise an error (`read_segments`).
    """
    resets, counts, t = segments.resets, segments.counts, x.shape[1]
    if counts is None:
        return read(x, resets, states)
    if torch.compiler.is_compiling():
        hidden, after = read(x, resets, states)
        return hidden, [old.where(counts == 0, new) for old, new in zip(states, after, strict=True)]
    groups, states_of_groups, whole = [], [], [torch.zeros_like(x)]
    for n in counts.unique().tolist():
        rows = (counts == n).nonzero()[:, 0]
        after = [state.select(rows) for state in states]
        if n:
            hidden, after = read(x[rows, t - n :], None if resets is None else resets[rows, t - n :], after)
            whole = [torch.zeros_like(x) for _ in hidden] if len(whole) != len(hidden) else whole
            for out, part in zip(whole, hidden, strict=True):
                out[rows, t - n :] = part
        groups.append(rows)
        states_of_groups.append(after)
    back = torch.cat(groups).argsort()
    return whole, [MemoryState.concatenate(parts).select(back) for parts in zip(*states_of_groups, strict=True)]
