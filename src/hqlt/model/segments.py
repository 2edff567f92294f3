"""Where segments begin, as Hugging Face says it: masks and positions become resets."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hqlt.shapes import Positions, Resets, check_resets


class Segments(NamedTuple):
    """How a call's tokens are read: in which order, and where a segment begins in that order."""

    resets: Resets | None
    order: Tensor | None  # [b, t] the column that is read at each place; None: as they come

    def sort(self, x: Tensor) -> Tensor:
        """x: [b, t, d], by columns → in the order in which it is read."""
        return x if self.order is None else x.take_along_dim(self.order[..., None], dim=1)

    def restore(self, x: Tensor) -> Tensor:
        """The inverse of `sort`."""
        return x if self.order is None else x.take_along_dim(self.order.argsort(dim=1)[..., None], dim=1)


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
    remembered: it is read before the row's real tokens, wherever it stood. (It could not be skipped after a token
    that is remembered from an earlier call; that is refused.) What a padding token says of itself does not count.

    Raises ValueError for shapes that do not fit, and for padding in a row that has real tokens in the past.
    """
    check_resets(resets, b, t)
    if resets is None and position_ids is not None:
        if position_ids.dim() != 2 or position_ids.shape[0] not in (1, b) or position_ids.shape[1] != t:
            raise ValueError(
                f"position_ids: expected [b, t] = [{b}, {t}] or [1, {t}], the positions of the new tokens, "
                f"got shape {list(position_ids.shape)}"
            )
        resets = (position_ids == 0).expand(b, t)
    order = None
    if attention_mask is not None and t:
        new, begins = _read_mask(attention_mask, b, t, past or 0)
        resets = begins if resets is None else resets & new | begins
        if _maybe(new[:, 1:] < new[:, :-1]):
            order = new.long().argsort(dim=1, stable=True)
            resets = resets.take_along_dim(order, dim=1)
    if resets is not None and not _maybe(resets[:, 1:] if past is None else resets):
        resets = None  # the first token of empty memories begins a segment anyway
    return Segments(resets, order)


def _read_mask(attention_mask: Tensor, b: int, t: int, past: int) -> tuple[Tensor, Tensor]:
    """Which new tokens are real, and which of them are their row's first: Bool [b, t] each."""
    if tuple(attention_mask.shape) != (b, past + t):
        seen = f"the {past} tokens in the cache and the {t} new ones" if past else "the tokens"
        raise ValueError(
            f"attention_mask: expected [b, {past + t}], 1 for a token and 0 for padding, over {seen}, with b = {b}; "
            f"got shape {list(attention_mask.shape)}. Leave it out where nothing is padded; packed documents are told "
            f"apart by `resets` or `position_ids`."
        )
    real = attention_mask.bool()
    new = real[:, past:]
    carried = real[:, :past].any(dim=1, keepdim=True)
    if not torch.compiler.is_compiling() and (carried & ~new).any():
        row = int((carried & ~new).any(dim=1).nonzero()[0])
        raise ValueError(
            f"attention_mask: expected no padding after tokens that the cache remembers, got some in row {row}: it "
            f"would be written to the memories. Go on with rows of equal length, or with each row by itself "
            f"(`cache.fork()`, then `batch_select_indices`), and join the states (`MemoryState.concatenate`)."
        )
    return new, new & (new.cumsum(dim=1) == 1) & ~carried


def _maybe(condition: Tensor) -> bool:
    """Whether it holds anywhere. While tracing nobody knows, and yes is always right, if slower."""
    return torch.compiler.is_compiling() or bool(condition.any())
