"""Lightning attention: linear attention with a fixed decay per head, slower in deeper layers."""

from __future__ import annotations

import torch.nn.functional as F

from hqlt.memory.fw.decay import fixed_decay
from hqlt.memory.fw.recurrence import Recurrence, Terms
from hqlt.memory.fw.rule import Write, check_depth
from hqlt.memory.heads import Heads
from hqlt.registry import register
from hqlt.shapes import Queries


@register("rule", "lightning")
class LightningMemory(Recurrence):
    """Lightning attention, with log α = −2^(−8i/h) · (1 − l / (L − 1 + 1e-5) + 1e-5) for head i ∈ 1 … h in layer l.

        S ← α S      S ← S + SiLU(k) ⊗ v      read: Sᵀ SiLU(q)

    The authors' layer also has SiLU on values, head_norm="full" and output_gate="sigmoid".

    Args:
        heads: number and width of the layer's heads.
        depth: (l, L), the layer's index and the number of layers; a model sets it for each of its layers.

    Source:
        MiniMax 2025, "MiniMax-01: Scaling Foundation Models with Lightning Attention", section 2.2, and its code for
        the decay; Qin et al. 2024, "Lightning Attention-2".

    Example:
        >>> import hqlt
        >>> layer = hqlt.HybridMemory(hidden_size=64, num_heads=4, fast_weights="lightning", output_gate="sigmoid")
    """

    erases = False

    def __init__(self, heads: Heads, *, depth: tuple[int, int] = (0, 1)) -> None:
        super().__init__(heads)
        layer, layers = self.depth = check_depth(depth)
        factor, h = 1 - layer / (layers - 1 + 1e-5) + 1e-5, heads.matrices
        self.log_alpha = [-factor * 2 ** (-8 * i / h) for i in range(1, h + 1)]

    def terms(self, q: Queries, write: Write) -> Terms:
        decay, v = fixed_decay(self.log_alpha, q), self.v_activation(write.values)
        return Terms(F.silu(q), F.silu(write.keys), v, decay=decay, erase=False, scale=1.0)

    def extra_repr(self) -> str:
        return f"depth={self.depth}"
