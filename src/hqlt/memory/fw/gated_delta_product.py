"""Gated DeltaProduct: decay the matrix, then take several steps of the delta rule."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from hqlt.memory.fw.decay import MatrixDecay
from hqlt.memory.fw.delta_product import DeltaProductMemory, ProductGates
from hqlt.memory.fw.recurrence import Terms
from hqlt.memory.fw.rule import Write
from hqlt.memory.heads import Heads
from hqlt.memory.state import Entry
from hqlt.registry import register
from hqlt.shapes import Hidden, Queries, Strengths


class GatedProductGates(NamedTuple):
    """The gates of gated DeltaProduct: those of `ProductGates`, and a decay."""

    beta: Strengths
    keys: Tensor
    values: Tensor
    decay: Strengths
    """[b, t, h] log α, in at least float32"""


@register("rule", "gated-delta-product")
class GatedDeltaProductMemory(MatrixDecay, DeltaProductMemory):
    """One decay per token, S ← α S, then the m writes of `DeltaProductMemory`.

    log α = −exp(A_log) · softplus(W_α x + dt_bias). Initially exp(A_log) is uniform in (0, 16) and softplus(dt_bias)
    log-uniform in (1e-3, 0.1). The authors' `a_proj` is `fw.decay_proj` here.

    Args:
        heads: number and width of the layer's heads.
        num_householder: number of writes per token m, at least 2.
        beta_max: maximum of β, at most 2, which the authors use.

    Source:
        Siems et al. 2025, "DeltaProduct: Improving State-Tracking in Linear RNNs via Householder Products", section 3,
        "Gated DeltaProduct".

    Example:
        >>> import hqlt
        >>> layer = hqlt.HybridMemory(hidden_size=64, num_heads=4, fast_weights="gated-delta-product")
    """

    slowest = 0.0

    def __init__(self, heads: Heads, *, num_householder: int = 2, beta_max: float = 2.0) -> None:
        super().__init__(heads, num_householder=num_householder, beta_max=beta_max)
        self.add_decay()
        self.init_parameters()

    def logits(self, x: Hidden) -> GatedProductGates:  # type: ignore[override]
        return GatedProductGates(*super().logits(x), self.decay_proj(x))

    def gates(self, logits: GatedProductGates) -> GatedProductGates:  # type: ignore[override]
        return GatedProductGates(*super().gates(ProductGates(*logits[:3])), self.log_decay(logits.decay))

    def gate_entries(self) -> GatedProductGates:  # type: ignore[override]
        return GatedProductGates(*super().gate_entries(), Entry((self.heads.matrices,)))  # type: ignore[arg-type]

    def terms(self, q: Queries, write: Write) -> Terms:
        return super().terms(q, write)._replace(decay=write.gates.decay)
