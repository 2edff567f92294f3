"""Retention: which KV entries stay visible after they leave the window."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hqlt.memory.heads import Heads
from hqlt.memory.state import Entry
from hqlt.registry import register
from hqlt.shapes import Keys, Positions, Values, at_least_float32

NEVER = 2**62
"""A position that no token has."""


class Kept(NamedTuple):
    """The entries that a retention holds between two calls, K a KV head: the oldest first, zeros in unused slots."""

    keys: Keys
    """[b, K, h, k] raw, as the recent ones"""
    values: Values
    """[b, K, h, v]"""
    positions: Tensor
    """[b, K, h] int64, in the segment"""
    scores: Tensor
    """[b, K + s, h] of these, then of the s recent entries that the KV-memory holds"""


class Candidates(NamedTuple):
    """All entries that a call may see, in order of age: those kept, those held, the new ones (l = K + s + t)."""

    keys: Keys  # [b, l, h, k]
    values: Values  # [b, l, h, v]
    positions: Tensor  # [b, l, h] in the entry's segment, negative for an unused slot
    scores: Tensor  # [b, l, h]
    segment: Tensor  # [b, l] the same for all entries of a segment
    expiry: Tensor  # [b, l, h] an entry is visible at positions from its own to expiry − 1

    def visible(self, t: int) -> Tensor:
        """Bool [b, t, l, h]: what each of the t new tokens sees."""
        now = self.positions[:, -t:, None]
        own = (self.segment[:, None] == self.segment[:, -t:, None])[..., None]
        begun = (self.positions[:, None] >= 0) & (self.positions[:, None] <= now)
        return own & begun & (now < self.expiry[:, None])


def expiry_of(leaves: Tensor, scores: Tensor, used: Tensor, segment: Tensor, kept: int) -> Tensor:
    """When an entry leaves the window, or later: when the `kept`-th one that outranks it has left the window too.

    What outranks an entry has a higher score, or the same and is older. leaves, segment: [b, l]; scores, used:
    [b, l, h] → [b, l, h]. Exact, in time and memory that grow as l².
    """
    mine, other, h = scores[:, :, None], scores[:, None], scores.shape[2]
    older = torch.ones(other.shape[2], other.shape[2], dtype=torch.bool, device=scores.device).tril(-1)[..., None]
    outranks = (other > mine) | ((other == mine) & older)  # [b, j, i, h]: i outranks j
    outranks &= used[:, None] & (segment[:, None] == segment[:, :, None])[..., None]
    last = (outranks.cumsum(dim=2, dtype=torch.int32) < kept).sum(dim=2)  # its index; l where there are fewer
    ends = F.pad(leaves, (0, 1), value=NEVER)[..., None].expand(-1, -1, h).gather(1, last)
    return leaves[..., None].maximum(ends)


class Retention(nn.Module):
    """Keeps `kept` entries a KV head beyond the window: those with the highest scores, ties to the older.

    An entry becomes eligible when it leaves the window; once it is out it never returns, and none outlives its segment.
    So entry j is visible to queries t with j ≤ t < expiry_j. A subclass says one thing, `score`. Options are the
    keyword-only arguments of the constructor; a registered retention's are the layer's own.
    """

    fewest = 1
    """The least number of entries to keep."""

    def __init__(self, heads: Heads, *, kept: int = 0) -> None:
        super().__init__()
        if kept < self.fewest:
            raise ValueError(
                f"kept: expected at least {self.fewest}, the number of entries that each KV head keeps beyond the "
                f"window, got {kept}; give kept, or retention='recent' to keep none"
            )
        self.heads, self.kept = heads, kept

    def score(self, keys: Keys, values: Values, positions: Positions) -> Tensor:
        """[b, t, h]: how much each entry is worth keeping, fixed when it is written. No gradient goes through it.

        positions: [b, t], in each one's segment. NaN counts as −∞.
        """
        raise NotImplementedError

    def forward(self, keys: Keys, values: Values, positions: Positions) -> Tensor:
        """The scores as they are compared and held: detached, in at least float32, without NaN."""
        scores = self.score(keys, values, positions).detach().to(at_least_float32(keys.dtype))
        return scores.masked_fill(scores.isnan(), -torch.inf)

    def entries(self, s: int) -> Kept:
        """What is held, without b, beside s recent entries."""
        h, K = self.heads.pairs, self.kept
        keys, values = (Entry((K, h, width), "narrow") for width in (self.heads.k, self.heads.v))
        return Kept(keys, values, Entry((K, h), "int64"), Entry((K + s, h)))  # type: ignore[arg-type]

    def candidates(
        self,
        keys: Keys,
        values: Values,
        positions: Positions,
        leaves: Tensor,
        past: Kept | None,
        count: Tensor,
        used: Tensor,
    ) -> Candidates:
        """keys, values, positions and leaves, [b, l, …], of the recent entries and the new ones.

        leaves: the position at which an entry leaves the window. past: what was kept after `count` [b] tokens of a
        segment, with the last min(K, used) [b] slots in use; None: nothing.
        """
        (b, l), h, K, device = keys.shape[:2], self.heads.pairs, self.kept, keys.device
        if past is None:
            past = pytree.tree_map(lambda entry: entry.zeros(b, keys, None), self.entries(0))
        s = past.scores.shape[1] - K
        new = self(keys[:, s:], values[:, s:], positions[:, s:])
        scores = torch.cat([past.scores.detach().to(new.dtype), new], dim=1)
        unused = torch.arange(K, 0, -1, device=device) > used[:, None]
        begin = torch.arange(l, device=device) - positions
        segment = torch.cat([(s - count)[:, None].expand(-1, K), begin], dim=1)
        recent = positions[..., None].expand(-1, -1, h)
        positions = torch.cat([past.positions.masked_fill(unused[..., None], -1), recent], dim=1)
        return Candidates(
            torch.cat([past.keys.to(keys.dtype), keys], dim=1),
            torch.cat([past.values.to(values.dtype), values], dim=1),
            positions,
            scores,
            segment,
            expiry_of(F.pad(leaves, (K, 0)), scores, positions >= 0, segment, K),  # what was kept has left already
        )

    def after(self, candidates: Candidates, recent_scores: Tensor, used: Tensor, left: Tensor) -> Kept:
        """What to hold of the last token's segment: of its first `used` [b] entries those that are visible once all
        of them have left the window, after position `left` [b]. recent_scores: [b, s, h] of the others."""
        keys, values, positions, scores, segment, expiry = candidates
        stays = (positions >= 0) & (positions < used[:, None, None]) & (segment == segment[:, -1:])[..., None]
        stays &= expiry > left[:, None, None]
        index = stays.byte().argsort(dim=1, stable=True)[:, -self.kept :]  # they come last, the oldest first
        unused = ~stays.gather(1, index)

        def taken(x: Tensor) -> Tensor:
            if x.dim() == 3:
                return x.gather(1, index).masked_fill(unused, 0)
            return x.gather(1, index[..., None].expand(*index.shape, x.shape[3])).masked_fill(unused[..., None], 0)

        return Kept(taken(keys), taken(values), taken(positions), torch.cat([taken(scores), recent_scores], dim=1))

    def extra_repr(self) -> str:
        return f"kept={self.kept}"


@register("retention", "recent")
class Recent(Retention):
    """The window's entries and nothing else: no state, no cost."""

    fewest = 0

    def __init__(self, heads: Heads) -> None:
        super().__init__(heads)


@register("retention", "value-norm")
class ValueNorm(Retention):
    """score = ‖v‖"""

    def score(self, keys: Keys, values: Values, positions: Positions) -> Tensor:
        return values.to(at_least_float32(values.dtype)).norm(dim=-1)


@register("retention", "random")
class Random(Retention):
    """score = a hash of head and position: the control, which every device and every split into calls gives alike.

    Source: Wellons, "lowbias32", github.com/skeeto/hash-prospector.
    """

    def score(self, keys: Keys, values: Values, positions: Positions) -> Tensor:
        h = self.heads.pairs
        x = (positions[..., None] * h + torch.arange(h, device=positions.device)) & 0xFFFFFFFF
        for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
            x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
        return ((x ^ (x >> 15)) >> 8).to(at_least_float32(values.dtype))  # 24 bits, exact in float32
