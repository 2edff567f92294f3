"""Expiry as its definition, comparing all pairs of entries: time and memory grow as l²."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hqlt.ops.backend import register_backend
from hqlt.ops.segments import segment_ids

NEVER = 2**62
"""Expiry of an entry that stays visible for good: an index beyond every timeline."""


@register_backend("expiry", "reference")
def expiry(scores: Tensor, leaves: Tensor, used: Tensor | None, resets: Tensor | None, kept: int) -> Tensor:
    return until(scores, *of_each_head(scores, leaves, used, resets), kept)


def of_each_head(
    scores: Tensor, leaves: Tensor, used: Tensor | None, resets: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`leaves`, the segment of each entry, and whether the entry exists, all expanded to [b, l, h]."""
    ids = torch.zeros_like(leaves) if resets is None else segment_ids(resets)
    used = torch.ones_like(leaves, dtype=torch.bool) if used is None else used
    return tuple(x[..., None].expand(scores.shape) for x in (leaves, ids, used))  # type: ignore[return-value]


def until(scores: Tensor, leaves: Tensor, ids: Tensor, used: Tensor, kept: int) -> Tensor:
    """Expiry of each entry. All tensors are [b, n, h], oldest entries first. An unused entry is never visible: 0."""
    mine, other = (lambda x: x[:, :, None]), (lambda x: x[:, None])
    older = torch.ones(*scores.shape[1:2] * 2, dtype=torch.bool, device=scores.device).tril(-1)[..., None]
    outranks = (other(scores) > mine(scores)) | ((other(scores) == mine(scores)) & older)  # [b, j, i, h]: i outranks j
    outranks &= other(used) & (other(ids) == mine(ids))
    last = (outranks.cumsum(dim=2, dtype=torch.int32) < kept).sum(
        dim=2
    )  # the kept-th that outranks j, n if there is none
    ends = F.pad(leaves, (0, 0, 0, 1), value=NEVER).gather(1, last)
    return leaves.maximum(ends).masked_fill(~used, 0)
