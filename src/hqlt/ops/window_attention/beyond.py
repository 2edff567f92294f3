"""KV entries that stay visible beyond the window."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hqlt.ops.heads import repeated
from hqlt.shapes import Keys, Queries, Resets


class Beyond(NamedTuple):
    """KV entries that have left the window but are still visible, in the same softmax as those in the window."""

    expiry: Tensor
    """int64 [b, l, h]: index i sees every earlier entry j with i < expiry_j. No entry outlives its segment (see
    `hqlt.ops.expiry`)."""
    most: int
    """Maximum number of entries that an index sees beyond its window."""
    q: Queries | None = None
    """[b, t, g·h, k]: queries to use beyond the window in place of q; by default, q itself."""
    k: Keys | None = None
    """[b, l, h, k]: keys to use beyond the window in place of k; by default, k itself."""

    def joined(self, q: Queries, k: Keys) -> tuple[Queries, Keys]:
        """q and k, with those for use beyond the window concatenated along the last axis, if there are any."""
        if self.q is None or self.k is None:
            return q, k
        return torch.cat([q, self.q.to(q.dtype)], dim=-1), torch.cat([k, self.k.to(k.dtype)], dim=-1)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Inverse of `joined`, for queries or keys: those for use within the window, and beyond it."""
        return (x, x) if self.q is None else tuple(x.chunk(2, dim=-1))  # type: ignore[return-value]


def lowest(t: int, l: int, window: int, resets: Tensor | None, device: torch.device) -> Tensor:
    """Index of the first entry within the window of each of the last t tokens: [1 or b, t]."""
    index = torch.arange(l, device=device)
    low = (index - (window - 1)).clamp(min=0)[None]
    if resets is not None:
        low = low.maximum(torch.where(resets, index, 0).cummax(dim=1).values)
    return low[:, l - t :]


def near_and_far(q: Queries, k: Keys, window: int, resets: Resets | None, beyond: Beyond) -> tuple[Tensor, Tensor]:
    """Masks of what the t queries see within the window, Bool[1 or b, 1, t, l], and beyond it, Bool[b, g·h, t, l]."""
    t, l = q.shape[1], k.shape[1]
    index = torch.arange(l, device=q.device)
    own, low = index[l - t :, None], lowest(t, l, window, resets, q.device)[:, None, :, None]
    expiry = repeated(q, beyond.expiry)[0].transpose(1, 2)[:, :, None]
    return (index >= low) & (index <= own), (index < low) & (own < expiry)
