"""Kimi delta attention: the gated delta rule, in which each row of the matrix decays by itself."""

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
    beta: Strengths
    """[b, t, h] write strengths, in at least float32."""
    decay: Keys
    """[b, t, h, k] log α, in at least float32."""


@register("rule", "kda")
class KDAMemory(Erasing):
    """S ← Diag(α) S      S ← S + φ(k) ⊗ β (v − Sᵀ φ(k))      read and φ as of the gated delta rule

    β = beta_max · σ(W_β x), log α = −exp(A_log) · softplus(W↑ W↓ x + dt_bias), with A_log of each head and dt_bias of
    each channel, begun as in Mamba-2. beta_max: at most 2; 1 is the authors'. decay_rank: rows of W↓ (None: a value
    head's width, as in the authors' code). decay_floor: the least log α, which then is decay_floor · σ(exp(A_log) ·
    (W↑ W↓ x + dt_bias)) with A_log begun at 0, as in the authors' later models with −5 (None: there is no least). Their
    output gate is the layer's, output_gate="sigmoid" with gate_rank a value head's width.

    Source: Kimi Team 2025, "Kimi Linear: An Expressive, Efficient Attention Architecture", eq. 1 and section 4; the
    bounded decay is `lower_bound` of the authors' code in flash-linear-attention.
    """

    def __init__(
        self, heads: Heads, *, beta_max: float = 1.0, decay_rank: int | None = None, decay_floor: float | None = None
    ) -> None:
        super().__init__(heads, beta_max)
        if decay_floor is not None and not decay_floor < 0:
            raise ValueError(f"decay_floor: expected a number below 0, the least log α, or None, got {decay_floor}")
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
