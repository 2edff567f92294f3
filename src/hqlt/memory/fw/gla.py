"""Gated linear attention: an input-dependent decay per row of the matrix."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from hqlt.memory.fw.recurrence import Recurrence, Terms
from hqlt.memory.fw.rule import LowRank, Write
from hqlt.memory.heads import Heads
from hqlt.memory.state import Entry
from hqlt.registry import register
from hqlt.shapes import Hidden, Keys, Queries, at_least_float32


class GLAGates(NamedTuple):
    """The gates of gated linear attention."""

    decay: Keys
    """[b, t, h, k] log α, in at least float32"""


@register("rule", "gla")
class GLAMemory(Recurrence):
    """Gated linear attention, with α = σ(W↑ W↓ x + b)^(1/τ) per key channel.

        S ← Diag(α) S      S ← S + k ⊗ v      read: Sᵀ q / √k

    In a language model b is initialized to 0. The authors' layer has fw_activation=None, output_gate=True, and keys
    half as wide as values.

    Args:
        heads: number and width of the layer's heads.
        decay_rank: number of rows of W↓.
        decay_temperature: τ; larger values keep α closer to 1.

    Raises:
        ValueError: when decay_temperature is not positive.

    Source:
        Yang et al. 2024, "Gated Linear Attention Transformers with Hardware-Efficient Training", sections 4.1 (eq. 3)
        and 4.4.

    Example:
        >>> import hqlt
        >>> layer = hqlt.HybridMemory(64, 4, blend="fw-only", fast_weights="gla", fw_activation=None)
    """

    erases = False

    def __init__(self, heads: Heads, *, decay_rank: int = 16, decay_temperature: float = 16.0) -> None:
        super().__init__(heads)
        if not decay_temperature > 0:
            raise ValueError(f"decay_temperature: expected a number above 0, got {decay_temperature}")
        self.temperature = decay_temperature
        self.decay_proj = LowRank(heads.hidden_size, decay_rank, heads.matrices * heads.k, bias=True)

    def logits(self, x: Hidden) -> Tensor:
        logits: Tensor = self.decay_proj(x)
        return logits

    def gates(self, logits: Tensor) -> GLAGates:
        logits = logits.to(at_least_float32(logits.dtype)).unflatten(-1, (self.heads.matrices, self.heads.k))
        return GLAGates(F.logsigmoid(logits) / self.temperature)

    def gate_entries(self) -> GLAGates:
        return GLAGates(Entry((self.heads.matrices, self.heads.k)))  # type: ignore[arg-type]

    def terms(self, q: Queries, write: Write) -> Terms:
        return Terms(q, write.keys, self.v_activation(write.values), decay=write.gates.decay, erase=False)

    def extra_repr(self) -> str:
        return f"decay_temperature={self.temperature}"
