"""The KV-memory: precise and short. Pairs are kept as they are, and read by softmax."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from hqlt import ops
from hqlt.memory.heads import Heads
from hqlt.memory.rotary import Rotary, apply_rotary
from hqlt.shapes import Keys, Queries, Resets, Values


class KVMemory(nn.Module):
    """Softmax attention over the latest `window` pairs (None: over all), with rotary positions or none.

        out_t = V_t softmax(K_tᵀ q_t / √k)        K_t, V_t: the pairs of tokens t−window+1 … t, q and k rotated

    Rotary positions act on differences alone, so a pair is held unrotated and its angle counted from wherever the
    call's timeline begins: no token counter grows, and nothing loses precision after a million tokens.

    Source: the paper, section 2.1; Su et al. 2021, "RoFormer", eq. 15 (whole head, halves rotated).
    """

    def __init__(
        self,
        heads: Heads,
        *,
        rope_theta: float | None = 10_000.0,
        partial_rotary_factor: float = 1.0,
        rope_scaling: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.positions = Rotary.of(rope_theta, partial_rotary_factor, rope_scaling)
        if self.positions is not None:
            self.positions.width(heads.k)  # refuses what cannot be turned

    @property
    def native(self) -> str | None:
        """What `hqlt.ops.step` calls this memory, where it runs it; a subclass says so anew."""
        plain = self.positions is None or (self.positions.fraction == 1 and self.positions.scaling is None)
        return "window" if plain else None

    def read(self, q: Queries, k: Keys, v: Values, window: int | None, resets: Resets | None) -> Values:
        """q: [b, t, g·h, k] of the new tokens; k, v: [b, l, h, ·], held pairs then new ones; resets: Bool[b, l]."""
        t, l = q.shape[1], k.shape[1]
        if (rotary := self.rotary(l, q)) is not None:
            cos, sin = rotary
            q, k = apply_rotary(q, cos[l - t :], sin[l - t :]), apply_rotary(k, cos, sin)
        return ops.window_attention(q, k, v, window=window, resets=resets)

    forward = read  # blends call the module, so that hooks on it are heard

    def rotary(self, l: int, q: Queries) -> tuple[Tensor, Tensor] | None:
        """cos and sin for a timeline of l pairs; None without positions."""
        return None if self.positions is None else self.positions.table(l, self.heads.k, q.device, q.dtype)

    def extra_repr(self) -> str:
        return f"positions={self.positions}"
