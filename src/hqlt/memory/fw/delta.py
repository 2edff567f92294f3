"""The delta rule: correct the value stored under a key."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from hqlt import ops
from hqlt.memory.fw.features import feature_map_of, is_plain_map
from hqlt.memory.fw.recurrence import Erasing, MatrixState, Terms
from hqlt.memory.fw.rule import Write
from hqlt.memory.heads import Heads
from hqlt.memory.state import Entry
from hqlt.registry import register
from hqlt.shapes import Hidden, Queries, Resets, Strengths


class DeltaGates(NamedTuple):
    """The gates of the delta rule."""

    beta: Strengths
    """[b, t, h] write strengths, in at least float32"""


@register("rule", "delta")
class DeltaMemory(Erasing):
    """The delta rule, with β = beta_max · σ(W_β x).

        W ← W + φ(k) ⊗ β (v − Wᵀ φ(k))        read: Wᵀ φ(q) / √k        φ(x) = SiLU(x) / √(‖SiLU(x)‖² + 1e-6)

    Args:
        heads: number and width of the layer's heads.
        beta_max: maximum of β, at most 2. State tracking needs values above 1; DeltaNet uses 1.
        beta_bias: initial bias of W_β. Default: no bias.
        feature_map: "learned" adds a learned matrix per head before φ (`LearnedMap`). Default: none.

    Source:
        The paper, section 2.2; Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule".

    Example:
        >>> import hqlt
        >>> layer = hqlt.HybridMemory(hidden_size=64, num_heads=4, fast_weights="delta", beta_max=1.0)
    """

    def __init__(
        self, heads: Heads, *, beta_max: float = 2.0, beta_bias: float | None = None, feature_map: str | None = None
    ) -> None:
        super().__init__(heads, beta_max, beta_bias)
        self.feature_map = feature_map_of(heads, feature_map)

    @property
    def native(self) -> str | None:  # type: ignore[override]
        """Name of this rule in `hqlt.ops.step`, which supports `LearnedMap` as feature map, but no subclass."""
        return "delta" if is_plain_map(self.feature_map) else None

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
