"""Decays: fixed, or input-dependent with Mamba-2's parameterisation."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hqlt.memory.fw.rule import FWMemory, gate_projection, init_parameter
from hqlt.shapes import Strengths, at_least_float32

STEPS = 1e-3, 0.1
"""Initial range of softplus(dt_bias), log-uniform."""


def log_decay(logits: Tensor, A_log: Tensor, dt_bias: Tensor) -> tuple[Strengths, Strengths]:
    """Return log α = −exp(A_log) · dt, and dt = softplus(logits + dt_bias), both in at least float32."""
    wide = at_least_float32(logits.dtype)
    dt = F.softplus(logits.to(wide) + dt_bias.to(wide))
    return -A_log.to(wide).exp() * dt, dt


def fixed_decay(log_alpha: list[float], like: Tensor) -> Strengths:
    """Return the log α of each matrix for every token of `like` [b, t, …]: [b, t, h], in at least float32."""
    numbers = torch.tensor(log_alpha, dtype=at_least_float32(like.dtype), device=like.device)
    return numbers.expand(*like.shape[:2], -1)


def init_decay(A_log: nn.Parameter, dt_bias: nn.Parameter, slowest: float = 1.0) -> None:
    """Draw exp(A_log) uniformly from (slowest, 16), and softplus(dt_bias) log-uniformly from (1e-3, 0.1)."""
    init_parameter(A_log, torch.empty_like(A_log).uniform_(slowest, 16).clamp(min=1e-4).log())
    low, high = map(math.log, STEPS)
    dt = torch.empty_like(dt_bias).uniform_(low, high).exp().clamp(min=1e-4)
    init_parameter(dt_bias, dt + (-torch.expm1(-dt)).log())  # softplus⁻¹(dt)


class MatrixDecay(FWMemory):
    """Mixin of rules with one decay per matrix, log α = −exp(A_log) · softplus(W_α x + dt_bias).

    Initially exp(A_log) is uniform in (`slowest`, 16) and softplus(dt_bias) log-uniform in (1e-3, 0.1).
    """

    slowest = 1.0

    def add_decay(self) -> None:
        """Create the parameters; called by the constructor of the rule, which determines their order."""
        self.decay_proj: nn.Module = gate_projection(self.heads.hidden_size, self.heads.matrices, None)
        self.A_log, self.dt_bias = (nn.Parameter(torch.empty(self.heads.matrices)) for _ in range(2))

    def init_parameters(self) -> None:
        super().init_parameters()
        init_decay(self.A_log, self.dt_bias, self.slowest)

    def log_decay(self, logits: Tensor) -> Strengths:
        """Return log α from W_α x, in at least float32."""
        return log_decay(logits, self.A_log, self.dt_bias)[0]
