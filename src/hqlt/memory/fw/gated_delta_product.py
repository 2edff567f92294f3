"""Gated DeltaProduct: forget a little of everything, then several steps of the delta rule."""

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
    beta: Strengths
    keys: Tensor
    values: Tensor
    """These as in `ProductGates`."""
    decay: Strengths
    """[b, t, h] log α, in at least float32."""


@register("rule", "gated-delta-product")
class GatedDeltaProductMemory(MatrixDecay, DeltaProductMemory):
    """S ← α S, then DeltaProduct's m writes: one decay for each token, however often it writes.

    log α = −exp(A_log) · softplus(W_α x + dt_bias); at the start exp(A_log) is uniform in (0, 16) and
    softplus(dt_bias) log-uniform in (1e-3, 0.1). The rest is as in `DeltaProductMemory`; the authors' `a_proj` is
    `fw.decay_proj` here.

    Source: Siems et al. 2025, "DeltaProduct: Improving State-Tracking in Linear RNNs via Householder Products",
    section 3, "Gated DeltaProduct".
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
