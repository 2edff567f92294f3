"""The KV entries that stay visible beyond the window, within a call and between calls."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hqlt import ops
from hqlt.shapes import Keys, Positions, Resets, Values


class Kept(NamedTuple):
    """Entries held beside the s recent ones: K per KV head (kept and sinks), oldest first, zeros in unused slots."""

    keys: Keys
    """[b, K, h, k] before feature map and rotary embedding"""
    values: Values
    """[b, K, h, v]"""
    positions: Tensor
    """[b, K, h] int64, position in the segment"""
    scores: Tensor
    """[b, K + s, h] scores of these entries, then of the s recent ones"""


class Timeline(NamedTuple):
    """The recent entries held from earlier calls, then the new ones: l = s + t."""

    keys: Keys  # [b, l, h, k]
    values: Values  # [b, l, h, v]
    position: Positions  # [b, l] in the segment
    resets: Resets | None  # Bool[b, l]
    leaves: Positions  # [b, l] the position at which an entry leaves the window
    before: Tensor  # [b] tokens of the current segment before the new ones
    used: Tensor  # [b] how many of them are not among the recent ones; the last min(K, used) kept slots are in use


class Candidates(NamedTuple):
    """All entries that a call may see, oldest first: kept, recent and new ones, l = K + s + t."""

    keys: Keys  # [b, l, h, k]
    values: Values  # [b, l, h, v]
    positions: Tensor  # [b, l, h] in the segment
    scores: Tensor  # [b, l, h]
    expiry: Tensor  # [b, l, h] entry j is visible to queries at indices j ≤ i < expiry_j
    offset: Tensor  # [b] index in the timeline minus position in the current segment


def candidates(timeline: Timeline, past: Kept | None, new_scores: Tensor, kept: int) -> Candidates:
    """Return the entries kept before (`past`), then the timeline; `new_scores` are of its last t entries."""
    keys, values, position, resets, leaves, before, used = timeline
    (l, h), device = keys.shape[1:3], keys.device
    s, index = l - new_scores.shape[1], torch.arange(l, device=device)
    positions, scores, there, n = position[..., None].expand(-1, -1, h), new_scores, None, 0
    if past is not None:
        n = past.keys.shape[1]
        slots = torch.arange(n, 0, -1, device=device) <= used[:, None]
        there = torch.cat([slots, (index >= s) | (position >= used[:, None])], dim=1)
        scores = torch.cat([past.scores.detach().to(new_scores.dtype), new_scores], dim=1)
        positions = torch.cat([past.positions, positions], dim=1)
        keys, values = (
            torch.cat([past.keys.to(keys.dtype), keys], 1),
            torch.cat([past.values.to(values.dtype), values], 1),
        )
        resets = None if resets is None else F.pad(resets, (n, 0))
    leaves = F.pad(leaves - position + index + n, (n, 0))  # kept entries have left the window already
    expiry = ops.expiry(scores, leaves, kept=kept, used=there, resets=resets)
    return Candidates(keys, values, positions, scores, expiry, s - before)


def kept_after(candidates: Candidates, K: int, recent_scores: Tensor, end: Tensor, left: Tensor) -> Kept:
    """Return what to keep when the entries from index `end` [b] on are held as recent ones.

    Of the entries before `end`, those are kept that are visible when all of them have left the window, at index `left`
    [b]. recent_scores is [b, s, h].
    """
    keys, values, positions, scores, expiry, _ = candidates
    missing = K - keys.shape[1]
    index = torch.arange(keys.shape[1], device=keys.device)
    stays = (index < end[:, None])[..., None] & (expiry > left[:, None, None])
    chosen = stays.byte().argsort(dim=1, stable=True)[:, -K:]  # kept entries come last, oldest first
    unused = ~stays.gather(1, chosen)

    def taken(x: Tensor) -> Tensor:
        if x.dim() == 3:
            return x.gather(1, chosen).masked_fill(unused, 0)
        return x.gather(1, chosen[..., None].expand(*chosen.shape, x.shape[3])).masked_fill(unused[..., None], 0)

    kept = (F.pad(taken(x), (*(0, 0) * (x.dim() - 2), max(missing, 0), 0)) for x in (keys, values, positions, scores))
    keys, values, positions, scores = kept
    return Kept(keys, values, positions, torch.cat([scores, recent_scores], dim=1))
