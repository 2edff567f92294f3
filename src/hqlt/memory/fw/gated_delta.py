"""The gated delta rule: forget a little of everything, then correct what is held under a key."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from hqlt import ops
from hqlt.memory.fw.decay import MatrixDecay
from hqlt.memory.fw.features import feature_map_of
from hqlt.memory.fw.recurrence import Erasing, Terms
from hqlt.memory.fw.rule import Write
from hqlt.memory.heads import Heads
from hqlt.memory.state import Entry
from hqlt.registry import register
from hqlt.shapes import Hidden, Queries, Strengths


class GatedDeltaGates(NamedTuple):
    beta: Strengths
    """[b, t, h] write strengths, in at least float32."""
    decay: Strengths
    """[b, t, h] log α, in at least float32."""


class GatedErasing(MatrixDecay, Erasing):
    """A rule with a write strength and a decay of each matrix; one that is registered begins them itself."""

    def __init__(self, heads: Heads, beta_max: float) -> None:
        super().__init__(heads, beta_max)
        self.add_decay()

    def logits(self, x: Hidden) -> tuple[Tensor, Tensor]:
        return self.beta_proj(x), self.decay_proj(x)

    def gates(self, logits: tuple[Tensor, Tensor]) -> GatedDeltaGates:
        beta, decay = logits
        return GatedDeltaGates(self.strengths(beta), self.log_decay(decay))

    def gate_entries(self) -> GatedDeltaGates:
        return GatedDeltaGates(*[Entry((self.heads.matrices,))] * 2)  # type: ignore[arg-type]


@register("rule", "gated-delta")
class GatedDeltaMemory(GatedErasing):
    """S ← α S      S ← S + φ(k) ⊗ β (v − Sᵀ φ(k))    read: Sᵀ φ(q) / √k    φ(x) = SiLU(x) / √(‖SiLU(x)‖² + 1e-6)

    β = beta_max · σ(W_β x), log α = −exp(A_log) · softplus(W_α x + dt_bias); at the start exp(A_log) is uniform in
    (1, 16) and softplus(dt_bias) log-uniform in (1e-3, 0.1), as in Mamba-2. beta_max: at most 2; 1 is the authors'.
    feature_map: "learned" puts a matrix of each head before φ (`LearnedMap`).

    Source: Yang, Kautz, Hatamizadeh 2025, "Gated Delta Networks: Improving Mamba2 with Delta Rule", eq. 10.
    """

    def __init__(self, heads: Heads, *, beta_max: float = 1.0, feature_map: str | None = None) -> None:
        super().__init__(heads, beta_max)
        self.feature_map = feature_map_of(heads, feature_map)
        self.init_parameters()

    @property
    def native(self) -> str | None:  # type: ignore[override]
        return "gated-delta" if self.feature_map is None else None

    def terms(self, q: Queries, write: Write) -> Terms:
        beta, decay = write.gates
        q, k = self.mapped(q, write.keys)
        return Terms(ops.unit_silu(q), ops.unit_silu(k), self.v_activation(write.values), beta, decay)
