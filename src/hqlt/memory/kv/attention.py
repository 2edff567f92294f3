"""The KV-memory: precise and short. Pairs are kept as they are, and read by softmax."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

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
    """Softmax attention over the latest `window` pairs (None: over all), and over those that stay visible beyond them.

        out_t = V_t softmax(K_tᵀ q_t / √k)        K_t, V_t: the pairs of tokens t−window+1 … t, and those kept

    Rotary positions act on differences alone, so a pair is held unrotated and its angle counted from wherever the
    call's timeline begins: no token counter grows, and nothing loses precision after a million tokens.

    retention: which entries stay visible beyond the window (None: none, as with "recent"). sinks: the first entries of
    a segment stay visible too, beside those `kept`. kept_alike: all heads keep the same entries, by the mean of their
    scores.

    How an entry beyond the window is read: kept_positions: at its true distance ("true"), as if it were `window` tokens
    away ("clamped"), or without rotation ("none"). kept_norm: RMSNorm of q and k of its own, weights of a head's width
    that all heads share, before the rotation. kept_gate: a number g for each query head, begun here, that is added to
    an entry's score, so that it weighs e^g as much; None: there is none.

    Source: the paper, section 2.1; Su et al. 2021, "RoFormer", eq. 15 (whole head, halves rotated); sinks: Xiao et al.
    2023, "Efficient Streaming Language Models with Attention Sinks"; norm and gate after HOLA, arXiv 2607.02303, whose
    gate weighs a read of its own and not entries of one softmax.
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
        """Slots of a KV head beyond the window."""
        self.retention = retention if self.kept else None
        if not self.kept and (kept_alike or kept_positions != "true" or kept_norm or kept_gate is not None):
            raise ValueError(
                f"kept_alike, kept_positions, kept_norm, kept_gate: expected as they are by default where nothing is "
                f"kept beyond the window, got {kept_alike}, {kept_positions!r}, {kept_norm}, {kept_gate}; give "
                f"retention and kept, or sinks"
            )
        self.positions = Rotary.of(rope_theta, partial_rotary_factor, rope_scaling)
        if self.positions is not None:
            self.positions.width(heads.k)  # refuses what cannot be turned
        self.q_norm, self.k_norm = (nn.RMSNorm(heads.k, eps=1e-6) if kept_norm else None for _ in range(2))
        self.initial_gate = kept_gate
        self.gate = None if kept_gate is None else nn.Parameter(torch.full((heads.queries,), float(kept_gate)))

    def init_parameters(self) -> None:
        """Put the gate to where it begins, whatever else has initialised it."""
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
        """A memory that keeps other entries, read in this way: with the weights that both have, and the same positions
        within the window."""
        which: dict[str, Any] = {"sinks": sinks, "kept_alike": kept_alike, "kept_positions": kept_positions}
        other = KVMemory(self.heads, retention, rope_theta=None, kept_norm=kept_norm, kept_gate=kept_gate, **which)
        other.positions = self.positions
        other.load_state_dict(self.state_dict(), strict=False, assign=True)
        return other

    @property
    def native(self) -> str | None:
        """What `hqlt.ops.step` calls this memory, where it runs it; a subclass says so anew."""
        plain = self.positions is None or (self.positions.fraction == 1 and self.positions.scaling is None)
        return "window" if plain and self.q_norm is None and self.gate is None else None

    @property
    def reads_alike(self) -> bool:
        """Whether entries beyond the window are compared as those within it: at their true distance, by the same norm,
        without a gate."""
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
        """q: [b, t, g·h, k] of the new tokens; k, v: [b, l, h, ·], held pairs then new ones; resets: Bool[b, l], where
        what is reached within the window begins anew.

        candidates: these pairs behind those kept beyond the window, where any are kept.
        """
        if self.kept and not candidates:
            raise ValueError(
                f"candidates: expected the entries kept beyond the window (kept={self.kept}), got none; a blend has "
                f"them from `KVMemory.candidates`"
            )
        t, l = q.shape[1], k.shape[1]
        turned = q, k
        if (rotary := self.rotary(l, q)) is not None:
            cos, sin = rotary
            turned = apply_rotary(q, cos[l - t :], sin[l - t :]), apply_rotary(k, cos, sin)
        if not candidates:
            return ops.window_attention(*turned, v, window=window, resets=resets)
        near, far = self._near_and_far(q, turned, candidates, window or 0)
        resets = None if resets is None else F.pad(resets, (candidates.keys.shape[1] - l, 0))
        beyond = Beyond(candidates.expiry, self.kept, *far)
        scale = self.heads.k**-0.5
        return ops.window_attention(*near, candidates.values, window=window, scale=scale, resets=resets, beyond=beyond)

    forward = read  # blends call the module, so that hooks on it are heard

    def _near_and_far(
        self, q: Queries, turned: QueriesAndKeys, candidates: Candidates, window: int
    ) -> tuple[QueriesAndKeys, QueriesAndKeys | tuple[()]]:
        """Queries and candidates as they are compared within the window, and beyond it; () where it is the same."""
        keys, (q_turned, k_turned) = candidates.keys, turned
        n = keys.shape[1] - k_turned.shape[1]
        near, far = (q_turned, torch.cat([keys[:, :n], k_turned], dim=1)), (q, keys)
        if self.q_norm is not None and self.k_norm is not None:
            far = self.q_norm(q), self.k_norm(keys)
        elif self.reads_alike:
            return (q_turned, torch.cat([self.old(keys[:, :n], candidates), k_turned], dim=1)), ()
        far = self._placed(*far, candidates, n, window)
        if self.gate is not None:  # one more number for each head: g in q, 1 in k
            gate = (self.gate * self.heads.k**0.5).to(q.dtype)[:, None].expand(*q.shape[:3], 1)
            far = torch.cat([far[0], gate], dim=-1), F.pad(far[1], (0, 1), value=1.0)
            near = F.pad(near[0], (0, 1)), F.pad(near[1], (0, 1))
        return near, far

    def _placed(self, q: Queries, keys: Keys, candidates: Candidates, n: int, window: int) -> QueriesAndKeys:
        """Turned as entries beyond the window are; the first n keys are older than the timeline."""
        if self.positions is None:
            return q, keys
        if self.kept_positions != "true":
            distance = window if self.kept_positions == "clamped" else 0
            return self._turned(q, distance), self._turned(keys, 0)
        t, l = q.shape[1], keys.shape[1] - n
        cos, sin = self.positions.table(l, self.heads.k, q.device, q.dtype)
        keys = torch.cat([self.old(keys[:, :n], candidates), apply_rotary(keys[:, n:], cos, sin)], dim=1)
        return apply_rotary(q, cos[l - t :], sin[l - t :]), keys

    def old(self, keys: Keys, candidates: Candidates, *, rotated_by_index: bool = False) -> Keys:
        """Kept keys [b, n, h, k] with the rotary embedding of their places, which lie before the timeline.

        rotated_by_index: leave out what the rotation of each key by its index among the candidates will add.
        """
        n = keys.shape[1]
        if self.positions is None or n == 0:
            return keys
        places = candidates.positions[:, :n] + candidates.offset[:, None, None]
        if rotated_by_index:
            places += n - torch.arange(n, device=keys.device)[:, None]
        cos, sin = self.positions.cos_sin(places.flatten(), self.heads.k, keys.dtype)
        return apply_rotary(keys.reshape(1, -1, 1, keys.shape[3]), cos, sin).view_as(keys)

    def _turned(self, x: Keys, place: int) -> Keys:
        """x [b, l, h, k], all at one place."""
        assert self.positions is not None
        cos, sin = self.positions.cos_sin(torch.tensor([place], device=x.device), self.heads.k, x.dtype)
        return apply_rotary(x.flatten(0, 1)[:, None], cos, sin).view_as(x)

    def candidates(self, timeline: Timeline, t: int, past: Kept | None, errors: Errors | None) -> Candidates:
        """The timeline's entries, of which the last t are new, behind those kept from before."""
        assert self.retention is not None, "nothing is kept"
        new = Entries(timeline.keys[:, -t:], timeline.values[:, -t:], timeline.position[:, -t:], errors)
        scores = self.retention(new)
        if self.kept_alike:
            mean = scores.mean(dim=-1, keepdim=True).clamp(-HIGHEST, HIGHEST)  # a sum may be out of their range
            scores = mean.expand_as(scores)
        if self.sinks:
            scores = scores.masked_fill((new.positions < self.sinks)[..., None], HIGHEST)
        return candidates(timeline, past, scores, self.kept)

    def kept_after(self, candidates: Candidates, recent_scores: Tensor, end: Tensor, left: Tensor) -> Kept:
        """What is kept after them (`hqlt.memory.kv.kept.kept_after`)."""
        return kept_after(candidates, self.kept, recent_scores, end, left)

    def kept_entries(self, s: int) -> Kept | tuple[()]:
        """What the state holds beside s recent entries, without b; () where nothing is kept."""
        if not self.kept:
            return ()
        h, K = self.heads.keys, self.kept
        keys, values = (Entry((K, h, width), "narrow") for width in (self.heads.k, self.heads.v))
        return Kept(keys, values, Entry((K, h), "int64"), Entry((K + s, h)))  # type: ignore[arg-type]

    def rotary(self, l: int, q: Queries) -> tuple[Tensor, Tensor] | None:
        """cos and sin for a timeline of l pairs; None without positions."""
        return None if self.positions is None else self.positions.table(l, self.heads.k, q.device, q.dtype)

    def extra_repr(self) -> str:
        alike = ", kept_alike=True" if self.kept_alike else ""
        kept = f", sinks={self.sinks}{alike}, kept_positions={self.kept_positions!r}" if self.kept else ""
        return f"positions={self.positions}{kept}"
