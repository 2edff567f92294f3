"""The delta rule: correct what the memory holds under a key."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from hqlt import ops
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
    W_β's bias begins (None: there is none).

    Source: the paper, section 2.2; Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule".
    """

    native = "delta"

    def __init__(self, heads: Heads, *, beta_max: float = 2.0, beta_bias: float | None = None) -> None:
        super().__init__(heads, beta_max, beta_bias)

    def logits(self, x: Hidden) -> Tensor:
        logits: Tensor = self.beta_proj(x)
        return logits

    def gates(self, logits: Tensor) -> DeltaGates:
        return DeltaGates(self.strengths(logits))

    def gate_entries(self) -> DeltaGates:
        return DeltaGates(Entry((self.heads.matrices,)))  # type: ignore[arg-type]

    def terms(self, q: Queries, write: Write) -> Terms:
        v = self.v_activation(write.values)
        return Terms(ops.unit_silu(q), ops.unit_silu(write.keys), v, write.gates.beta)

    def forward(
        self, q: Queries, write: Write, past: MatrixState | None, resets: Resets | None, *, errors: bool = False
    ) -> tuple[Any, ...]:
        if errors:
            return super().forward(q, write, past, resets, errors=True)
        q, k, v = self.terms(q, write)[:3]
        state = None if past is None else past.matrix
        out, matrix = ops.delta_rule(q, k, v, write.gates.beta, state=state, resets=resets, live=write.live)
        return out, MatrixState(matrix)
