"""Retentions: which KV entries are kept when they leave the window."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from hqlt.memory.fw import Errors
from hqlt.memory.heads import Heads
from hqlt.registry import check_choice, register
from hqlt.shapes import Keys, Positions, Values, at_least_float32

HIGHEST = torch.finfo(torch.float32).max
"""Largest score, because a state must be finite."""


class Entries(NamedTuple):
    """New KV entries, as given to a retention."""

    keys: Keys
    """[b, t, h, k] before feature map and rotary embedding"""
    values: Values
    """[b, t, h, v]"""
    positions: Positions
    """[b, t] in the segment"""
    errors: Errors | None
    """Prediction errors of the FW-memory just before the write; None unless `needs_errors`"""


class Retention(nn.Module):
    """Base class of retentions, which keep the entries with the highest scores beyond the window, ties to the older.

    An entry becomes eligible when it leaves the window. A discarded entry never returns, and entries are dropped at the
    end of their segment. A subclass defines `score`. Its options are the keyword-only arguments of its constructor;
    once it is registered, they are options of the layer.

    Args:
        heads: number and width of the layer's heads.
        kept: number of entries that each KV head keeps.

    Raises:
        ValueError: when kept is too small.
    """

    fewest = 1
    """Minimum of `kept`."""
    needs_errors = False
    """Whether `score` uses the prediction errors of the FW-memory, which must then be known when an entry arrives."""
    native: str | None = None
    """Name of this score in `hqlt.ops.step`, if it supports it; not inherited by subclasses."""

    def __init__(self, heads: Heads, *, kept: int = 0) -> None:
        super().__init__()
        if kept < self.fewest:
            raise ValueError(
                f"kept: expected at least {self.fewest}, the number of entries that each KV head keeps beyond the "
                f"window, got {kept}; give kept, or retention='recent' to keep none"
            )
        self.heads, self.kept = heads, kept

    def score(self, new: Entries) -> Tensor:
        """Return the score of each new entry, [b, t, h]. It is detached later; NaN counts as the lowest score."""
        raise NotImplementedError

    def forward(self, new: Entries) -> Tensor:
        """Return the scores as they are compared and stored: detached, finite, in at least float32."""
        scores = self.score(new).detach().to(at_least_float32(new.keys.dtype))
        return scores.nan_to_num(-HIGHEST, HIGHEST, -HIGHEST).clamp(-HIGHEST, HIGHEST)

    if TYPE_CHECKING:
        __call__ = forward

    def extra_repr(self) -> str:
        return f"kept={self.kept}"


@register("retention", "recent")
class Recent(Retention):
    """Keeps no entries beyond the window, except sinks.

    Args:
        heads: number and width of the layer's heads.

    Example:
        >>> import hqlt
        >>> layer = hqlt.HybridMemory(hidden_size=64, num_heads=4, window=8, retention="recent", sinks=4)
    """

    fewest = 0
    native = "recent"

    def __init__(self, heads: Heads) -> None:
        super().__init__(heads)

    def score(self, new: Entries) -> Tensor:
        return new.values.new_full(new.values.shape[:3], -torch.inf)


@register("retention", "surprise")
class Surprise(Retention):
    """score = ‖v − Wᵀφ(k)‖, with W just before the entry is written (after its decay), or β times that.

    The error measures how much of the value the FW-memory does not know yet. For several writes per token it is the
    root of the sum of squares.

    Args:
        heads: number and width of the layer's heads.
        kept: number of entries that each KV head keeps.
        score: "error", or "beta-error" for β times the error, the size of the actual correction.

    Example:
        >>> import hqlt
        >>> layer = hqlt.HybridMemory(64, 4, window=8, retention="surprise", kept=24, score="beta-error")
    """

    needs_errors = True

    def __init__(self, heads: Heads, *, kept: int = 0, score: str = "error") -> None:
        super().__init__(heads, kept=kept)
        check_choice("score", score, ("error", "beta-error"))
        self.weighted = score == "beta-error"

    @property
    def native(self) -> str:  # type: ignore[override]
        """Name of this score in `hqlt.ops.step`."""
        return "beta-error" if self.weighted else "error"

    def score(self, new: Entries) -> Tensor:
        assert new.errors is not None, "the layer rejects rules and blends without errors"
        return new.errors.weighted if self.weighted else new.errors.plain

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, score={'beta-error' if self.weighted else 'error'!r}"


@register("retention", "value-norm")
class ValueNorm(Retention):
    """score = ‖v‖

    Example:
        >>> import hqlt
        >>> layer = hqlt.HybridMemory(hidden_size=64, num_heads=4, window=8, retention="value-norm", kept=24)
    """

    native = "value-norm"

    def score(self, new: Entries) -> Tensor:
        return new.values.to(at_least_float32(new.values.dtype)).norm(dim=-1)


@register("retention", "random")
class Random(Retention):
    """score = a hash of head and position, equal on every device and for every split into calls; a control.

    Source:
        Wellons, "lowbias32", github.com/skeeto/hash-prospector.

    Example:
        >>> import hqlt
        >>> layer = hqlt.HybridMemory(hidden_size=64, num_heads=4, window=8, retention="random", kept=24)
    """

    native = "random"

    def score(self, new: Entries) -> Tensor:
        h = self.heads.keys
        x = (new.positions[..., None] * h + torch.arange(h, device=new.positions.device)) & 0xFFFFFFFF
        for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
            x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
        return ((x ^ (x >> 15)) >> 8).to(at_least_float32(new.values.dtype))  # 24 bits, exact in float32
