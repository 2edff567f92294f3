"""The additive rule: linear attention with a normalizer."""

from __future__ import annotations

import torch.nn.functional as F

from hqlt import ops
from hqlt.memory.fw.features import Hedgehog, feature_map_of, is_plain_map
from hqlt.memory.fw.rule import FWMemory, Write
from hqlt.memory.heads import Heads
from hqlt.memory.state import Entry
from hqlt.ops import LinearState
from hqlt.registry import register
from hqlt.shapes import Queries, Resets, Values


@register("rule", "linear")
class LinearMemory(FWMemory):
    """Linear attention, with φ(x) = elu(x) + 1.

        W ← W + φ(k) ⊗ v     z ← z + φ(k)     read: Wᵀ φ(q) / (z·φ(q) + 1e-10)

    Args:
        heads: number and width of the layer's heads.
        feature_map: "learned" adds a learned matrix per head before φ (`LearnedMap`); "hedgehog" replaces φ by one of
            twice the width (`Hedgehog`). Default: none.

    Source:
        Katharopoulos et al. 2020, "Transformers are RNNs", eqs. 18–20.

    Example:
        >>> import hqlt
        >>> layer = hqlt.HybridMemory(hidden_size=64, num_heads=4, fast_weights="linear", feature_map="hedgehog")
    """

    erases = False

    def __init__(self, heads: Heads, *, feature_map: str | None = None) -> None:
        super().__init__(heads)
        self.feature_map = feature_map_of(heads, feature_map, ("learned", "hedgehog"))

    @property
    def native(self) -> str | None:  # type: ignore[override]
        """Name of this rule in `hqlt.ops.step`, which supports `LearnedMap` as feature map, but no subclass."""
        return "linear" if is_plain_map(self.feature_map) else None

    def state_entries(self) -> LinearState:
        h, k, v = self.heads.matrices, self.key_width, self.heads.v
        return LinearState(Entry((h, k, v)), Entry((h, k)))  # type: ignore[arg-type]

    def forward(
        self, q: Queries, write: Write, past: LinearState | None, resets: Resets | None
    ) -> tuple[Values, LinearState]:
        q, k = self.mapped(q, write.keys)
        if not isinstance(self.feature_map, Hedgehog):
            q, k = F.elu(q) + 1, F.elu(k) + 1
        return ops.linear_attention(q, k, self.v_activation(write.values), state=past, resets=resets, live=write.live)
