"""Retention: which KV entries are worth keeping when they leave the window."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from hqlt.memory.fw import Errors
from hqlt.memory.heads import Heads
from hqlt.registry import check_choice, register
from hqlt.shapes import Keys, Positions, Values, at_least_float32

HIGHEST = torch.finfo(torch.float32).max
"""Of all scores; a state holds no infinity."""


class Entries(NamedTuple):
    """New entries, as a retention sees them."""

    keys: Keys
    """[b, t, h, k] before rotary positions"""
    values: Values
    """[b, t, h, v]"""
    positions: Positions
    """[b, t] in each one's segment"""
    errors: Errors | None
    """What the FW-memory predicted wrongly before it wrote them; None for a retention that does not ask for it."""


class Retention(nn.Module):
    """Keeps `kept` entries a KV head beyond the window: those with the highest scores, ties to the older.

    An entry becomes eligible when it leaves the window; once it is out it never returns, and none outlives its segment.
    A subclass says one thing, `score`. Options are the keyword-only arguments of the constructor; a registered
    retention's are the layer's own.
    """

    fewest = 1
    """The least number of entries to keep."""
    needs_errors = False
    """Whether `score` asks for the FW-memory's errors, which a layer must then have when an entry arrives."""
    native: str | None = None
    """What `hqlt.ops.step` calls this score, where it knows it; a subclass says so anew."""

    def __init__(self, heads: Heads, *, kept: int = 0) -> None:
        super().__init__()
        if kept < self.fewest:
            raise ValueError(
                f"kept: expected at least {self.fewest}, the number of entries that each KV head keeps beyond the "
                f"window, got {kept}; give kept, or retention='recent' to keep none"
            )
        self.heads, self.kept = heads, kept

    def score(self, new: Entries) -> Tensor:
        """[b, t, h]: how much each entry is worth keeping, fixed when it arrives. No gradient goes through it.

        NaN is worth least of all.
        """
        raise NotImplementedError

    def forward(self, new: Entries) -> Tensor:
        """The scores as they are compared and held: detached, in at least float32, finite."""
        scores = self.score(new).detach().to(at_least_float32(new.keys.dtype))
        return scores.nan_to_num(-HIGHEST, HIGHEST, -HIGHEST).clamp(-HIGHEST, HIGHEST)

    def extra_repr(self) -> str:
        return f"kept={self.kept}"


@register("retention", "recent")
class Recent(Retention):
    """The window's entries and nothing else (but for sinks): every other one is worth nothing."""

    fewest = 0
    native = "recent"

    def __init__(self, heads: Heads) -> None:
        super().__init__(heads)

    def score(self, new: Entries) -> Tensor:
        return new.values.new_full(new.values.shape[:3], -torch.inf)


@register("retention", "surprise")
class Surprise(Retention):
    """score = ‖v − Wᵀφ(k)‖ with W as it is before the entry is written (after its decay), or that times β

    How wrongly the FW-memory predicts a value is how little of it the FW-memory already holds. score: "error", or
    "beta-error" for β times as much, what is in fact corrected. Of several writes a token, the root of the sum of
    squares.
    """

    needs_errors = True

    def __init__(self, heads: Heads, *, kept: int = 0, score: str = "error") -> None:
        super().__init__(heads, kept=kept)
        check_choice("score", score, ("error", "beta-error"))
        self.weighted = score == "beta-error"

    @property
    def native(self) -> str:  # type: ignore[override]
        return "beta-error" if self.weighted else "error"

    def score(self, new: Entries) -> Tensor:
        assert new.errors is not None, "the layer refuses what cannot say them"
        return new.errors.weighted if self.weighted else new.errors.plain

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, score={'beta-error' if self.weighted else 'error'!r}"


@register("retention", "value-norm")
class ValueNorm(Retention):
    """score = ‖v‖"""

    native = "value-norm"

    def score(self, new: Entries) -> Tensor:
        return new.values.to(at_least_float32(new.values.dtype)).norm(dim=-1)


@register("retention", "random")
class Random(Retention):
    """score = a hash of head and position: the control, which every device and every split into calls gives alike.

    Source: Wellons, "lowbias32", github.com/skeeto/hash-prospector.
    """

    native = "random"

    def score(self, new: Entries) -> Tensor:
        h = self.heads.keys
        x = (new.positions[..., None] * h + torch.arange(h, device=new.positions.device)) & 0xFFFFFFFF
        for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
            x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
        return ((x ^ (x >> 15)) >> 8).to(at_least_float32(new.values.dtype))  # 24 bits, exact in float32
