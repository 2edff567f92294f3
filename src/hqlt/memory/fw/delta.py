"""The delta rule: correct what the memory holds under a key."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from hqlt import ops
from hqlt.memory.fw.features import feature_map_of
from hqlt.memory.fw.recurrence import Erasing, MatrixState, Terms
from hqlt.memory.fw.rule import Write
from hqlt.memory.heads import Heads
from hqlt.memory.state import Entry
from hqlt.registry import register
from hqlt.shapes import Hidden, Queries, Resets, Strengths


class DeltaGates(NamedTuple):
    beta: Strengths
    """[b, t, h] write strengths, in at least float32."""


@register("rule", "delta")
class DeltaMemory(Erasing):
    """W ← W + φ(k) ⊗ β (v − Wᵀ φ(k))        read: Wᵀ φ(q) / √k        φ(x) = SiLU(x) / √(‖SiLU(x)‖² + 1e-6)

    β = beta_max · σ(W_β x). beta_max: at most 2, with which the rule tracks state; 1 is DeltaNet's. beta_bias: where
    W_β's bias begins (None: there is none). feature_map: "learned" puts a matrix of each head before φ (`LearnedMap`).

    Source: the paper, section 2.2; Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule".
    """

    def __init__(
        self, heads: Heads, *, beta_max: float = 2.0, beta_bias: float | None = None, feature_map: str | None = None
    ) -> None:
        super().__init__(heads, beta_max, beta_bias)
        self.feature_map = feature_map_of(heads, feature_map)

    @property
    def native(self) -> str | None:  # type: ignore[override]
        return "delta" if self.feature_map is None else None

    def logits(self, x: Hidden) -> Tensor:
        logits: Tensor = self.beta_proj(x)
        return logits

    def gates(self, logits: Tensor) -> DeltaGates:
        return DeltaGates(self.strengths(logits))

    def gate_entries(self) -> DeltaGates:
        return DeltaGates(Entry((self.heads.matrices,)))  # type: ignore[arg-type]

    def terms(self, q: Queries, write: Write) -> Terms:
        v = self.v_activation(write.values)
        q, k = self.mapped(q, write.keys)
        return Terms(ops.unit_silu(q), ops.unit_silu(k), v, write.gates.beta)

    def forward(
        self, q: Queries, write: Write, past: MatrixState | None, resets: Resets | None, *, errors: bool = False
    ) -> tuple[Any, ...]:
        if errors:
            return super().forward(q, write, past, resets, errors=True)
        q, k, v = self.terms(q, write)[:3]
        state = None if past is None else past.matrix
        out, matrix = ops.delta_rule(q, k, v, write.gates.beta, state=state, resets=resets, live=write.live)
        return out, MatrixState(matrix)
