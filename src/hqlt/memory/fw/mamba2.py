"""Mamba-2's state-space model: a step size that decides at once how much is forgotten and how much is written."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hqlt.memory.fw.decay import init_decay, log_decay
from hqlt.memory.fw.recurrence import Recurrence, Terms
from hqlt.memory.fw.rule import Write, gate_projection, init_parameter
from hqlt.memory.heads import Heads
from hqlt.memory.state import Entry
from hqlt.registry import register
from hqlt.shapes import Hidden, Queries, Strengths, Values


class Mamba2Gates(NamedTuple):
    dt: Strengths
    """[b, t, h] step sizes, in at least float32."""
    decay: Strengths
    """[b, t, h] log α, in at least float32."""


@register("rule", "mamba2")
class Mamba2Memory(Recurrence):
    """S ← α S      S ← S + B ⊗ dt · v      read: Sᵀ C + D · v      B = SiLU(k)      C = SiLU(q)

    dt = softplus(W_dt x + dt_bias), log α = −exp(A_log) · dt. At the start exp(A_log) is uniform in (1, 16),
    softplus(dt_bias) log-uniform in (1e-3, 0.1), D is 1. The v that D weighs is the reading token's own, whenever it is
    written. skip=False: without D.

    The authors' layer has one memory (blend="fw-only") of num_heads groups, num_value_heads heads that share their
    group's B and C, conv_size=4, output_gate=True, head_norm="full" and norm_after_gate=True: norm(y · SiLU(z)).

    Source: Dao, Gu 2024, "Transformers are SSMs", sections 7.1–7.3, and Mamba-2's code for where parameters begin.
    """

    erases = False

    def __init__(self, heads: Heads, *, skip: bool = True) -> None:
        super().__init__(heads)
        self.dt_proj: nn.Module = gate_projection(heads.hidden_size, heads.matrices, None)
        self.A_log, self.dt_bias = (nn.Parameter(torch.empty(heads.matrices)) for _ in range(2))
        self.D = nn.Parameter(torch.empty(heads.matrices)) if skip else None
        self.init_parameters()

    def init_parameters(self) -> None:
        init_decay(self.A_log, self.dt_bias)
        if self.D is not None:
            init_parameter(self.D, torch.ones_like(self.D))

    def logits(self, x: Hidden) -> Tensor:
        logits: Tensor = self.dt_proj(x)
        return logits

    def gates(self, logits: Tensor) -> Mamba2Gates:
        decay, dt = log_decay(logits, self.A_log, self.dt_bias)
        return Mamba2Gates(dt, decay)

    def gate_entries(self) -> Mamba2Gates:
        return Mamba2Gates(*[Entry((self.heads.matrices,))] * 2)  # type: ignore[arg-type]

    def terms(self, q: Queries, write: Write) -> Terms:
        dt, decay = write.gates
        values = self.v_activation(write.values)
        return Terms(F.silu(q), F.silu(write.keys), values, dt, decay, erase=False, scale=1.0)

    def skip(self, values: Values) -> Values | None:
        if self.D is None:
            return None
        return self.D.to(values.dtype)[:, None] * self.v_activation(values)
