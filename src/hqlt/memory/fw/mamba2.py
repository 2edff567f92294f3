"""Mamba-2's state-space model: one step size controls both decay and write strength."""

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
    """The gates of Mamba-2."""

    dt: Strengths
    """[b, t, h] step sizes, in at least float32"""
    decay: Strengths
    """[b, t, h] log α, in at least float32"""


@register("rule", "mamba2")
class Mamba2Memory(Recurrence):
    """Mamba-2, with dt = softplus(W_dt x + dt_bias) and log α = −exp(A_log) · dt.

        S ← α S      S ← S + B ⊗ dt · v      read: Sᵀ C + D · v      B = SiLU(k)      C = SiLU(q)

    Initially exp(A_log) is uniform in (1, 16), softplus(dt_bias) log-uniform in (1e-3, 0.1), and D is 1. D multiplies
    the v of the reading token, whenever that token is written.

    The authors' layer has blend="fw-only" with num_heads groups, num_value_heads heads that share the B and C of their
    group, conv_size=4, output_gate=True, head_norm="full" and norm_after_gate=True, which is norm(y · SiLU(z)).

    Args:
        heads: number and width of the layer's heads.
        skip: whether there is a D.

    Source:
        Dao, Gu 2024, "Transformers are SSMs", sections 7.1–7.3; initial values as in Mamba-2's code.

    Example:
        >>> import hqlt
        >>> layer = hqlt.HybridMemory(hidden_size=64, num_heads=4, fast_weights="mamba2", conv_size=4, output_gate=True)
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
