"""Which pairs stay visible beyond the window."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hqlt.ops.heads import repeated
from hqlt.shapes import Keys, Queries, Resets


class Beyond(NamedTuple):
    """Pairs that have left the window and are still visible, in the same softmax as those of the window."""

    expiry: Tensor
    """int64 [b, l, h]: an index i sees each earlier pair j with i < expiry_j, which no segment outlives (as of
    `hqlt.ops.expiry`)."""
    most: int
    """How many an index sees beyond its window, at most."""
    q: Queries | None = None
    """[b, t, g·h, k] what is compared with k, and k [b, l, h, k], in place of q and k: None where it is the same."""
    k: Keys | None = None

    def joined(self, q: Queries, k: Keys) -> tuple[Queries, Keys]:
        """What is compared within the window, and behind it what is compared beyond, where there are two."""
        if self.q is None or self.k is None:
            return q, k
        return torch.cat([q, self.q.to(q.dtype)], dim=-1), torch.cat([k, self.k.to(k.dtype)], dim=-1)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Its opposite: (within, beyond), of queries or keys."""
        return (x, x) if self.q is None else tuple(x.chunk(2, dim=-1))  # type: ignore[return-value]


def lowest(t: int, l: int, window: int, resets: Tensor | None, device: torch.device) -> Tensor:
    """The first pair within the window of each of the last t indices: [1 or b, t]."""
    index = torch.arange(l, device=device)
    low = (index - (window - 1)).clamp(min=0)[None]
    if resets is not None:
        low = low.maximum(torch.where(resets, index, 0).cummax(dim=1).values)
    return low[:, l - t :]


def near_and_far(q: Queries, k: Keys, window: int, resets: Resets | None, beyond: Beyond) -> tuple[Tensor, Tensor]:
    """What the t queries see within the window, Bool[1 or b, 1, t, l], and beyond it, Bool[b, g·h, t, l]."""
    t, l = q.shape[1], k.shape[1]
    index = torch.arange(l, device=q.device)
    own, low = index[l - t :, None], lowest(t, l, window, resets, q.device)[:, None, :, None]
    expiry = repeated(q, beyond.expiry)[0].transpose(1, 2)[:, :, None]
    return (index >= low) & (index <= own), (index < low) & (own < expiry)
