"""The delta rule: correct what the memory holds under a key."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from hqlt import ops
from hqlt.memory.fw.recurrence import MatrixState
from hqlt.memory.fw.rule import FWMemory, Write, gate_projection
from hqlt.memory.heads import Heads
from hqlt.memory.state import Entry
from hqlt.registry import register
from hqlt.shapes import Hidden, Queries, Resets, Strengths, Values, at_least_float32


class DeltaGates(NamedTuple):
    beta: Strengths
    """[b, t, h] write strengths, in at least float32."""


@register("rule", "delta")
class DeltaMemory(FWMemory):
    """W ← W + φ(k) ⊗ β (v − Wᵀ φ(k))        read: Wᵀ φ(q) / √k        φ(x) = SiLU(x) / √(‖SiLU(x)‖² + 1e-6)

    β = beta_max · σ(W_β x). beta_max: at most 2, with which the rule tracks state; 1 is DeltaNet's. beta_bias: where
    W_β's bias begins (None: there is none).

    Source: the paper, section 2.2; Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule".
    """

    native = "delta"

    def __init__(self, heads: Heads, *, beta_max: float = 2.0, beta_bias: float | None = None) -> None:
        super().__init__(heads)
        if not 0 < beta_max <= 2:
            raise ValueError(f"beta_max: expected a number in (0, 2] (above 2 the delta rule diverges), got {beta_max}")
        self.beta_max, self.beta_bias = beta_max, beta_bias
        self.beta_proj: nn.Module = gate_projection(heads.hidden_size, heads.matrices, beta_bias)

    def begin(self) -> None:
        if self.beta_bias is not None:
            nn.init.constant_(self.beta_proj.bias, self.beta_bias)  # type: ignore[arg-type]

    def logits(self, x: Hidden) -> Tensor:
        logits: Tensor = self.beta_proj(x)
        return logits

    def gates(self, logits: Tensor) -> DeltaGates:
        return DeltaGates(self.beta_max * logits.to(at_least_float32(logits.dtype)).sigmoid())

    def gate_entries(self) -> DeltaGates:
        return DeltaGates(Entry((self.heads.matrices,)))  # type: ignore[arg-type]

    def state_entries(self) -> MatrixState:
        return MatrixState(Entry((self.heads.matrices, self.heads.k, self.heads.v)))  # type: ignore[arg-type]

    def forward(
        self, q: Queries, write: Write, past: MatrixState | None, resets: Resets | None
    ) -> tuple[Values, MatrixState]:
        out, matrix = ops.delta_rule(
            ops.unit_silu(q),
            ops.unit_silu(write.keys),
            self.v_activation(write.values),
            write.gates.beta,
            state=None if past is None else past.matrix,
            resets=resets,
            live=write.live,
        )
        return out, MatrixState(matrix)

    def extra_repr(self) -> str:
        return f"beta_max={self.beta_max}"
