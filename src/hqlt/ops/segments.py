"""Helpers for the two kinds of token marks: `resets` marks tokens that begin a new segment, across which nothing is
read or written; `live` marks tokens that are written at all."""

from __future__ import annotations

import torch
from torch import Tensor

from hqlt.shapes import Live, Positions, Resets


def segment_ids(resets: Resets) -> Tensor:
    """Number of segments begun up to and including each token: [b, t]. 0 is the segment that the state continues."""
    return resets.long().cumsum(dim=1)


def positions(resets: Resets | None, before: Tensor, t: int) -> Positions:
    """Position of each of t tokens within its segment, from 0: [b, t].

    before: [b], the number of earlier tokens in each row's current segment.
    """
    index = torch.arange(t, device=before.device)
    running = before[:, None] + index
    if resets is None:
        return running
    latest_reset = torch.where(resets, index, -1).cummax(dim=1).values
    return torch.where(latest_reset < 0, running, index - latest_reset)


def written(live: Live | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors [b, t, …] with zeros, which write nothing, at tokens that are not live."""
    if live is None:
        return tensors
    return tuple(x.masked_fill(~live.view(*live.shape, *(1,) * (x.dim() - 2)), 0) for x in tensors)
