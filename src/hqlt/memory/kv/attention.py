"""The KV-memory: exact and short. KV entries are stored as they are and read by softmax attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hqlt import ops
from hqlt.memory.fw import Errors
from hqlt.memory.heads import Heads
from hqlt.memory.kv.kept import Candidates, Kept, Timeline, candidates, kept_after
from hqlt.memory.kv.retention import HIGHEST, Entries, Recent, Retention
from hqlt.memory.rotary import Rotary, apply_rotary
from hqlt.memory.state import Entry
from hqlt.ops import Beyond
from hqlt.registry import check_choice
from hqlt.shapes import Keys, Queries, Resets, Values

KEPT_POSITIONS = ("true", "clamped", "none")
QueriesAndKeys: TypeAlias = tuple[Queries, Keys]


class KVMemory(nn.Module):
    """Softmax attention over the entries of the window and those kept beyond it.

        out_t = V_t softmax(K_tᵀ q_t / √k)        K_t, V_t: tokens t−window+1 … t, and kept entries

    The rotary embedding depends on differences of positions only. Keys are therefore stored before it is applied, and
    positions count from the start of a call's timeline: no position grows, and no precision is lost in long texts.

    Args:
        heads: number and width of the layer's heads.
        retention: which entries stay visible beyond the window. Default: none, as "recent".
        rope_theta: base of the rotary embedding. None: no positions.
        partial_rotary_factor: fraction of a head that is rotated.
        rope_scaling: scaling of the rotary embedding, as in transformers (`hqlt.memory.rotary.Rotary`). Default: none.
        sinks: number of first entries of a segment that stay visible, in addition to those kept by the retention.
        kept_alike: whether all heads keep the same entries, by the mean of their scores.
        kept_positions: positions of entries beyond the window: their "true" distance, the distance `window`
            ("clamped"), or no rotation ("none").
        kept_norm: whether queries and entries beyond the window have their own RMSNorm, before the rotation, with
            weights of a head's width shared by all heads.
        kept_gate: initial value of a learned number g per query head that is added to the logits of entries beyond the
            window, which multiplies their weight by e^g. Default: no gate.

    Raises:
        ValueError: when an option is invalid, or when kept_* options are given although nothing is kept.

    Source:
        The paper, section 2.1; Su et al. 2021, "RoFormer", eq. 15; Xiao et al. 2023, "Efficient Streaming Language
        Models with Attention Sinks". Norm and gate follow HOLA, arXiv 2607.02303, whose gate weighs a separate read
        instead of entries of one softmax.

    Example:
        >>> import hqlt
        >>> layer = hqlt.HybridMemory(64, 4, window=8, retention="value-norm", kept=24, sinks=4)
        >>> layer.kv.kept
        28
    """

    def __init__(
        self,
        heads: Heads,
        retention: Retention | None = None,
        *,
        rope_theta: float | None = 10_000.0,
        partial_rotary_factor: float = 1.0,
        rope_scaling: Mapping[str, Any] | None = None,
        sinks: int = 0,
        kept_alike: bool = False,
        kept_positions: str = "true",
        kept_norm: bool = False,
        kept_gate: float | None = None,
    ) -> None:
        super().__init__()
        if sinks < 0:
            raise ValueError(f"sinks: expected a number of entries, at least 0, got {sinks}")
        check_choice("kept_positions", kept_positions, KEPT_POSITIONS)
        self.heads, self.sinks, self.kept_alike, self.kept_positions = heads, sinks, kept_alike, kept_positions
        retention = Recent(heads) if retention is None else retention
        self.kept = sinks + retention.kept
        """Number of slots per KV head beyond the window."""
        self.retention = retention if self.kept else None
        if not self.kept and (kept_alike or kept_positions != "true" or kept_norm or kept_gate is not None):
            raise ValueError(
                f"kept_alike, kept_positions, kept_norm, kept_gate: expected their defaults, because nothing is kept "
                f"beyond the window, got {kept_alike}, {kept_positions!r}, {kept_norm}, {kept_gate}; give "
                f"retention and kept, or sinks"
            )
        self.positions = Rotary.of(rope_theta, partial_rotary_factor, rope_scaling)
        if self.positions is not None:
            self.positions.width(heads.k)  # raises for a width that cannot be rotated
        self.q_norm, self.k_norm = (nn.RMSNorm(heads.k, eps=1e-6) if kept_norm else None for _ in range(2))
        self.initial_gate = kept_gate
        self.gate = None if kept_gate is None else nn.Parameter(torch.full((heads.queries,), float(kept_gate)))

    def init_parameters(self) -> None:
        """Set the gate's initial value."""
        if self.gate is not None and self.initial_gate is not None:
            nn.init.constant_(self.gate, self.initial_gate)

    def with_retention(
        self,
        retention: Retention | None,
        *,
        sinks: int = 0,
        kept_alike: bool = False,
        kept_positions: str = "true",
        kept_norm: bool = False,
        kept_gate: float | None = None,
    ) -> KVMemory:
        """Return a KV-memory with this retention and these options, and the same positions and common weights."""
        which: dict[str, Any] = {"sinks": sinks, "kept_alike": kept_alike, "kept_positions": kept_positions}
        other = KVMemory(self.heads, retention, rope_theta=None, kept_norm=kept_norm, kept_gate=kept_gate, **which)
        other.positions = self.positions
        other.load_state_dict(self.state_dict(), strict=False, assign=True)
        return other

    @property
    def native(self) -> str | None:
        """Name of this memory in `hqlt.ops.step`, if it supports it; not inherited by subclasses."""
        positions = self.positions
        plain = positions is None or (positions.fraction == 1 and positions.frequencies(self.heads.k)[1] == 1)
        return "window" if plain and self.q_norm is None and self.gate is None else None

    @property
    def reads_uniformly(self) -> bool:
        """Whether entries beyond the window are read like those within it: at true distances, without norm or gate."""
        true_distance = self.positions is None or self.kept_positions == "true"
        return true_distance and self.q_norm is None and self.gate is None

    def read(
        self,
        q: Queries,
        k: Keys,
        v: Values,
        window: int | None,
        resets: Resets | None,
        candidates: Candidates | tuple[()] = (),
    ) -> Values:
        """Attend to held and new entries.

        Args:
            q ([b, t, g·h, k]): queries of the new tokens, before the rotary embedding.
            k ([b, l, h, k]): keys of the timeline, held entries first, before the rotary embedding.
            v ([b, l, h, v]): values of the timeline.
            window: number of latest entries that are visible. None: all.
            resets (Bool[b, l]): entries at which visibility within the window restarts. None: none.
            candidates: the entries that may be visible beyond the window. Default: none.

        Returns:
            The read [b, t, g·h, v].
        """
        if self.kept and not candidates:
            raise ValueError(
                f"candidates: expected the entries kept beyond the window (kept={self.kept}), got none; a blend has "
                f"them from `KVMemory.candidates`"
            )
        t, l = q.shape[1], k.shape[1]
        rotated = q, k
        if (rotary := self.rotary(l, q)) is not None:
            cos, sin = rotary
            rotated = apply_rotary(q, cos[l - t :], sin[l - t :]), apply_rotary(k, cos, sin)
        if not candidates:
            return ops.window_attention(*rotated, v, window=window, resets=resets)
        near, far = self._near_and_far(q, rotated, candidates, window or 0)
        resets = None if resets is None else F.pad(resets, (candidates.keys.shape[1] - l, 0))
        beyond = Beyond(candidates.expiry, self.kept, *far)
        scale = self.heads.k**-0.5
        return ops.window_attention(*near, candidates.values, window=window, scale=scale, resets=resets, beyond=beyond)

    forward = read

    if TYPE_CHECKING:
        __call__ = forward

    def _near_and_far(
        self, q: Queries, rotated: QueriesAndKeys, candidates: Candidates, window: int
    ) -> tuple[QueriesAndKeys, QueriesAndKeys | tuple[()]]:
        """Return queries and keys for comparisons within the window, and beyond it (() if they are the same)."""
        keys, (q_rotated, k_rotated) = candidates.keys, rotated
        n = keys.shape[1] - k_rotated.shape[1]
        near, far = (q_rotated, torch.cat([keys[:, :n], k_rotated], dim=1)), (q, keys)
        if self.q_norm is not None and self.k_norm is not None:
            far = self.q_norm(q), self.k_norm(keys)
        elif self.reads_uniformly:
            return (q_rotated, torch.cat([self.rotate_kept(keys[:, :n], candidates), k_rotated], dim=1)), ()
        far = self._rotate_far(*far, candidates, n, window)
        if self.gate is not None:  # an extra channel per head: g in q, 1 in k
            gate = (self.gate * self.heads.k**0.5).to(q.dtype)[:, None].expand(*q.shape[:3], 1)
            far = torch.cat([far[0], gate], dim=-1), F.pad(far[1], (0, 1), value=1.0)
            near = F.pad(near[0], (0, 1)), F.pad(near[1], (0, 1))
        return near, far

    def _rotate_far(self, q: Queries, keys: Keys, candidates: Candidates, n: int, window: int) -> QueriesAndKeys:
        """Apply the rotary embedding as beyond the window; the first n keys are older than the timeline."""
        if self.positions is None:
            return q, keys
        if self.kept_positions != "true":
            distance = window if self.kept_positions == "clamped" else 0
            return self._rotate_all(q, distance), self._rotate_all(keys, 0)
        t, l = q.shape[1], keys.shape[1] - n
        cos, sin = self.positions.table(l, self.heads.k, q.device, q.dtype)
        keys = torch.cat([self.rotate_kept(keys[:, :n], candidates), apply_rotary(keys[:, n:], cos, sin)], dim=1)
        return apply_rotary(q, cos[l - t :], sin[l - t :]), keys

    def rotate_kept(self, keys: Keys, candidates: Candidates, *, rotated_by_index: bool = False) -> Keys:
        """Apply the rotary embedding to kept keys [b, n, h, k], which precede the timeline.

        With rotated_by_index, omit the rotation of each key by its index among the candidates, which is applied later.
        """
        n = keys.shape[1]
        if self.positions is None or n == 0:
            return keys
        positions = candidates.positions[:, :n] + candidates.offset[:, None, None]
        if rotated_by_index:
            positions = positions + n - torch.arange(n, device=keys.device)[:, None]
        cos, sin = self.positions.cos_sin(positions.flatten(), self.heads.k, keys.dtype)
        if rotated_by_index:
            factor = self.positions.frequencies(self.heads.k)[1]  # YaRN's, which the rotation by index applies as well
            cos, sin = cos / factor, sin / factor
        return apply_rotary(keys.reshape(1, -1, 1, keys.shape[3]), cos, sin).view_as(keys)

    def _rotate_all(self, x: Keys, position: int) -> Keys:
        """Apply the rotary embedding of one position to all of x [b, l, h, k]."""
        assert self.positions is not None
        cos, sin = self.positions.cos_sin(torch.tensor([position], device=x.device), self.heads.k, x.dtype)
        return apply_rotary(x.flatten(0, 1)[:, None], cos, sin).view_as(x)

    def candidates(self, timeline: Timeline, t: int, past: Kept | None, errors: Errors | None) -> Candidates:
        """Return the kept entries followed by the timeline's, of which the last t are new."""
        assert self.retention is not None, "nothing is kept"
        new = Entries(timeline.keys[:, -t:], timeline.values[:, -t:], timeline.position[:, -t:], errors)
        scores = self.retention(new)
        if self.kept_alike:
            mean = scores.mean(dim=-1, keepdim=True).clamp(-HIGHEST, HIGHEST)  # the sum may overflow
            scores = mean.expand_as(scores)
        if self.sinks:
            scores = scores.masked_fill((new.positions < self.sinks)[..., None], HIGHEST)
        return candidates(timeline, past, scores, self.kept)

    def kept_after(self, candidates: Candidates, recent_scores: Tensor, end: Tensor, left: Tensor) -> Kept:
        """Return what is kept afterwards (see `hqlt.memory.kv.kept.kept_after`)."""
        return kept_after(candidates, self.kept, recent_scores, end, left)

    def kept_entries(self, s: int) -> Kept | tuple[()]:
        """Return the `Entry`s of what the state holds beside s recent entries; () if nothing is kept."""
        if not self.kept:
            return ()
        h, K = self.heads.keys, self.kept
        keys, values = (Entry((K, h, width), "narrow") for width in (self.heads.k, self.heads.v))
        return Kept(keys, values, Entry((K, h), "int64"), Entry((K + s, h)))  # type: ignore[arg-type]

    def rotary(self, l: int, q: Queries) -> tuple[Tensor, Tensor] | None:
        """Return cos and sin for a timeline of l entries; None without positions."""
        return None if self.positions is None else self.positions.table(l, self.heads.k, q.device, q.dtype)

    def extra_repr(self) -> str:
        alike = ", kept_alike=True" if self.kept_alike else ""
        kept = f", sinks={self.sinks}{alike}, kept_positions={self.kept_positions!r}" if self.kept else ""
        return f"positions={self.positions}{kept}"
