"""Kimi delta attention: the gated delta rule with a decay per row of the matrix."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from hqlt import ops
from hqlt.memory.fw.decay import init_decay, log_decay
from hqlt.memory.fw.recurrence import Erasing, Terms
from hqlt.memory.fw.rule import LowRank, Write, init_parameter
from hqlt.memory.heads import Heads
from hqlt.memory.state import Entry
from hqlt.registry import register
from hqlt.shapes import Hidden, Keys, Queries, Strengths, at_least_float32


class KDAGates(NamedTuple):
    """The gates of Kimi delta attention."""

    beta: Strengths
    """[b, t, h] write strengths, in at least float32"""
    decay: Keys
    """[b, t, h, k] log α, in at least float32"""


@register("rule", "kda")
class KDAMemory(Erasing):
    """Kimi delta attention, with β = beta_max · σ(W_β x) and log α = −exp(A_log) · softplus(W↑ W↓ x + dt_bias).

        S ← Diag(α) S      S ← S + φ(k) ⊗ β (v − Sᵀ φ(k))      read and φ as in the gated delta rule

    A_log is one number per head and dt_bias one per channel, initialized as in Mamba-2. The authors' output gate is
    output_gate="sigmoid" of the layer, with the width of a value head as gate_rank.

    Args:
        heads: number and width of the layer's heads.
        beta_max: maximum of β, at most 2; the authors use 1. State tracking needs values above 1.
        decay_rank: number of rows of W↓. Default: the width of a value head, as in the authors' code.
        decay_floor: minimum of log α, which is then decay_floor · σ(exp(A_log) · (W↑ W↓ x + dt_bias)) with A_log
            initialized to 0, as in the authors' later models with −5. Default: no minimum.

    Raises:
        ValueError: when decay_floor is not negative.

    Source:
        Kimi Team 2025, "Kimi Linear: An Expressive, Efficient Attention Architecture", eq. 1 and section 4; the bounded
        decay is `lower_bound` in the authors' code in flash-linear-attention.

    Example:
        >>> import hqlt
        >>> layer = hqlt.HybridMemory(hidden_size=64, num_heads=4, fast_weights="kda", beta_max=2.0)
    """

    def __init__(
        self, heads: Heads, *, beta_max: float = 1.0, decay_rank: int | None = None, decay_floor: float | None = None
    ) -> None:
        super().__init__(heads, beta_max)
        if decay_floor is not None and not decay_floor < 0:
            raise ValueError(
                f"decay_floor: expected a number below 0 (the minimum of log α), or None, got {decay_floor}"
            )
        self.decay_floor = decay_floor
        rank = heads.v if decay_rank is None else decay_rank
        self.decay_proj = LowRank(heads.hidden_size, rank, heads.matrices * heads.k)
        self.A_log = nn.Parameter(torch.empty(heads.matrices))
        self.dt_bias = nn.Parameter(torch.empty(heads.matrices * heads.k))
        self.init_parameters()

    def init_parameters(self) -> None:
        super().init_parameters()
        init_decay(self.A_log, self.dt_bias)
        if self.decay_floor is not None:
            init_parameter(self.A_log, torch.zeros_like(self.A_log))

    def logits(self, x: Hidden) -> tuple[Tensor, Tensor]:
        return self.beta_proj(x), self.decay_proj(x)

    def gates(self, logits: tuple[Tensor, Tensor]) -> KDAGates:
        beta, decay = logits
        rows = self.heads.matrices, self.heads.k
        decay, A_log, bias = decay.unflatten(-1, rows), self.A_log[:, None], self.dt_bias.view(rows)
        if self.decay_floor is None:
            return KDAGates(self.strengths(beta), log_decay(decay, A_log, bias)[0])
        wide = at_least_float32(decay.dtype)
        sharp = A_log.to(wide).exp() * (decay.to(wide) + bias.to(wide))
        return KDAGates(self.strengths(beta), self.decay_floor * sharp.sigmoid())

    def gate_entries(self) -> KDAGates:
        h, k = self.heads.matrices, self.heads.k
        return KDAGates(Entry((h,)), Entry((h, k)))  # type: ignore[arg-type]

    def terms(self, q: Queries, write: Write) -> Terms:
        beta, decay = write.gates
        return Terms(ops.unit_silu(q), ops.unit_silu(write.keys), self.v_activation(write.values), beta, decay)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, decay_floor={self.decay_floor}"
