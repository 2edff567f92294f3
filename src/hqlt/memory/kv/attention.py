"""The KV-memory: precise and short. Pairs are kept as they are, and read by softmax."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from hqlt import ops
from hqlt.memory.heads import Heads
from hqlt.memory.kv.retention import Candidates, Kept, Retention
from hqlt.memory.rotary import Rotary, apply_rotary
from hqlt.ops import contain
from hqlt.ops.heads import group, repeated
from hqlt.shapes import Keys, Queries, Resets, Values


class KVMemory(nn.Module):
    """Softmax attention over the latest `window` pairs (None: over all), with rotary positions or none.

        out_t = V_t softmax(K_tᵀ q_t / √k)        K_t, V_t: the pairs of tokens t−window+1 … t, q and k rotated

    Rotary positions act on differences alone, so a pair is held unrotated and its angle counted from wherever the
    call's timeline begins: no token counter grows, and nothing loses precision after a million tokens.

    retention: which entries stay visible beyond the window, at their true distance; None: none, as with "recent".

    Source: the paper, section 2.1; Su et al. 2021, "RoFormer", eq. 15 (whole head, halves rotated).
    """

    def __init__(
        self,
        heads: Heads,
        retention: Retention | None = None,
        *,
        rope_theta: float | None = 10_000.0,
        partial_rotary_factor: float = 1.0,
        rope_scaling: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.kept = 0 if retention is None else retention.kept
        self.retention = retention if self.kept else None
        self.positions = Rotary.of(rope_theta, partial_rotary_factor, rope_scaling)
        if self.positions is not None:
            self.positions.width(heads.k)  # refuses what cannot be turned

    @property
    def native(self) -> str | None:
        """What `hqlt.ops.step` calls this memory, where it runs it; a subclass says so anew."""
        plain = self.positions is None or (self.positions.fraction == 1 and self.positions.scaling is None)
        return "window" if plain and not self.kept else None

    def read(
        self,
        q: Queries,
        k: Keys,
        v: Values,
        window: int | None,
        resets: Resets | None,
        candidates: Candidates | tuple[()] = (),
    ) -> Values:
        """q: [b, t, g·h, k] of the new tokens; k, v: [b, l, h, ·], held pairs then new ones; resets: Bool[b, l].

        candidates: these pairs and those kept beyond the window, where the retention keeps any.
        """
        if self.kept:
            return self._read_candidates(q, candidates, resets)
        t, l = q.shape[1], k.shape[1]
        if (rotary := self.rotary(l, q)) is not None:
            cos, sin = rotary
            q, k = apply_rotary(q, cos[l - t :], sin[l - t :]), apply_rotary(k, cos, sin)
        return ops.window_attention(q, k, v, window=window, resets=resets)

    forward = read  # blends call the module, so that hooks on it are heard

    def _read_candidates(self, q: Queries, candidates: Candidates | tuple[()], resets: Resets | None) -> Values:
        """The same over all candidates, by a mask. NaN and infinity stay in their segment, not in what is visible."""
        if not candidates:
            raise ValueError(
                f"candidates: expected the entries kept beyond the window (kept={self.kept}), got none; a blend reads "
                f"the KV-memory by Blend.attend"
            )
        k, v, positions = candidates[:3]
        t, l = q.shape[1], k.shape[1]
        mask = candidates.visible(t).permute(0, 3, 1, 2).repeat_interleave(group(q, k), dim=1)
        if self.positions is not None:
            q, k = self._turned(q, positions[:, -t:, :1]), self._turned(k, positions)

        def run(*qkv: Tensor) -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in qkv)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

        resets = None if resets is None else F.pad(resets, (self.kept, 0))
        return contain.attention(run, resets, l, q, *repeated(q, k, v))

    def _turned(self, x: Keys, positions: Tensor) -> Keys:
        """x: [b, l, h, k], at positions [b, l, h or 1] in its segment."""
        assert self.positions is not None
        cos, sin = self.positions.waves(positions.flatten(), self.heads.k, x.dtype)
        heads = x.shape[2] if positions.shape[2] == 1 else 1  # that share a position
        return apply_rotary(x.reshape(1, cos.shape[0], heads, x.shape[3]), cos, sin).view_as(x)

    def kept_entries(self, s: int) -> Kept | tuple[()]:
        """What the state holds beside s recent entries, without b; () where nothing is kept."""
        return () if self.retention is None else self.retention.entries(s)

    def rotary(self, l: int, q: Queries) -> tuple[Tensor, Tensor] | None:
        """cos and sin for a timeline of l pairs; None without positions."""
        return None if self.positions is None else self.positions.table(l, self.heads.k, q.device, q.dtype)

    def extra_repr(self) -> str:
        return f"positions={self.positions}"
