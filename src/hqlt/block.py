"""A layer with its memories, then a multilayer perceptron, each added to what it read."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from hqlt.layer import HybridMemory
from hqlt.memory import MemoryState
from hqlt.norm import RMSNorm
from hqlt.shapes import Hidden, Resets


class SwiGLU(nn.Module):
    """W_down (SiLU(W_gate x) ⊙ W_up x).

    Source: Shazeer 2020, "GLU Variants Improve Transformer", eq. 6.
    """

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Hidden) -> Hidden:
        out: Hidden = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Block(nn.Module):
    """x ← x + memory(RMSNorm(x)); x ← x + mlp(RMSNorm(x))."""

    def __init__(self, memory: HybridMemory, mlp: SwiGLU, norm_eps: float) -> None:
        super().__init__()
        self.memory_norm = RMSNorm(memory.hidden_size, eps=norm_eps)
        self.memory = memory
        self.mlp_norm = RMSNorm(memory.hidden_size, eps=norm_eps)
        self.mlp = mlp

    def forward(self, x: Hidden, resets: Resets | None, *state: Tensor) -> tuple[Tensor, ...]:
        """x: [b, t, d]; state: the parts of a MemoryState, or nothing → x, and the parts of the state after it.

        (Parts, not the tuple that they make, so that checkpointing sees every tensor: gradients flow through a carried
        state with it as without.)
        """
        read, after = self.memory(self.memory_norm(x), MemoryState(*state) if state else None, resets)
        x = x + read
        return x + self.mlp(self.mlp_norm(x)), *after

    def residual_writers(self) -> tuple[nn.Linear, nn.Linear]:
        """The two linear maps whose outputs are added to the residual stream."""
        return self.memory.o_proj, self.mlp.down_proj
