"""The gated delta rule: decay the matrix, then correct the value stored under a key."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from hqlt import ops
from hqlt.memory.fw.decay import MatrixDecay
from hqlt.memory.fw.features import feature_map_of, is_plain_map
from hqlt.memory.fw.recurrence import Erasing, Terms
from hqlt.memory.fw.rule import Write
from hqlt.memory.heads import Heads
from hqlt.memory.state import Entry
from hqlt.registry import register
from hqlt.shapes import Hidden, Queries, Strengths


class GatedDeltaGates(NamedTuple):
    """The gates of the gated delta rule."""

    beta: Strengths
    """[b, t, h] write strengths, in at least float32"""
    decay: Strengths
    """[b, t, h] log α, in at least float32"""


class GatedErasing(MatrixDecay, Erasing):
    """Base class of rules with one write strength and one decay per matrix; subclasses call `init_parameters`."""

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
    """The gated delta rule, with β = beta_max · σ(W_β x) and log α = −exp(A_log) · softplus(W_α x + dt_bias).

        S ← α S      S ← S + φ(k) ⊗ β (v − Sᵀ φ(k))    read: Sᵀ φ(q) / √k    φ(x) = SiLU(x) / √(‖SiLU(x)‖² + 1e-6)

    Initially exp(A_log) is uniform in (1, 16) and softplus(dt_bias) log-uniform in (1e-3, 0.1), as in Mamba-2.

    Args:
        heads: number and width of the layer's heads.
        beta_max: maximum of β, at most 2; the authors use 1. State tracking needs values above 1.
        feature_map: "learned" adds a learned matrix per head before φ (`LearnedMap`). Default: none.

    Source:
        Yang, Kautz, Hatamizadeh 2025, "Gated Delta Networks: Improving Mamba2 with Delta Rule", eq. 10.

    Example:
        >>> import hqlt
        >>> layer = hqlt.HybridMemory(hidden_size=64, num_heads=4, fast_weights="gated-delta", beta_max=2.0)
    """

    def __init__(self, heads: Heads, *, beta_max: float = 1.0, feature_map: str | None = None) -> None:
        super().__init__(heads, beta_max)
        self.feature_map = feature_map_of(heads, feature_map)
        self.init_parameters()

    @property
    def native(self) -> str | None:  # type: ignore[override]
        """Name of this rule in `hqlt.ops.step`, which supports `LearnedMap` as feature map, but no subclass."""
        return "gated-delta" if is_plain_map(self.feature_map) else None

    def terms(self, q: Queries, write: Write) -> Terms:
        beta, decay = write.gates
        q, k = self.mapped(q, write.keys)
        return Terms(ops.unit_silu(q), ops.unit_silu(k), self.v_activation(write.values), beta, decay)
