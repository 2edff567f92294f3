"""A layer with its memories, then a multilayer perceptron, each added to what it read."""

from __future__ import annotations

import torch.nn.functional as F
from torch import nn

from hqlt.layer.layer import HybridMemory
from hqlt.layer.norm import RMSNorm, ZeroCenteredRMSNorm
from hqlt.memory import MemoryState
from hqlt.registry import check_choice
from hqlt.shapes import Hidden, Resets


class SwiGLU(nn.Module):
    """W_down (SiLU(W_gate x) ⊙ W_up x).

    Source: Shazeer 2020, "GLU Variants Improve Transformer", eq. 6.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: Hidden) -> Hidden:
        out: Hidden = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


BLOCK_NORMS = {"before": (True, False), "after": (False, True), "both": (True, True)}
"""Where a block has norms: of what its parts read, of what they add."""


class Block(nn.Module):
    """x ← x + memory(RMSNorm(x)); x ← x + mlp(RMSNorm(x)).

    norms: "before" a part, as above; "after" it, x + RMSNorm(memory(x)); or "both". zero_centered: their weight is
    1 + w.
    """

    def __init__(
        self,
        memory: HybridMemory,
        mlp: SwiGLU,
        norm_eps: float,
        *,
        norms: str = "before",
        zero_centered: bool = False,
    ) -> None:
        super().__init__()
        check_choice("norms", norms, BLOCK_NORMS)
        kind = ZeroCenteredRMSNorm if zero_centered else RMSNorm

        def norm(wanted: bool) -> nn.Module:
            return kind(memory.hidden_size, eps=norm_eps) if wanted else nn.Identity()

        before, after = BLOCK_NORMS[norms]
        self.memory_norm = norm(before)
        self.memory = memory
        self.memory_out_norm = norm(after)
        self.mlp_norm = norm(before)
        self.mlp = mlp
        self.mlp_out_norm = norm(after)

    def forward(
        self, x: Hidden, resets: Resets | None = None, state: MemoryState | None = None
    ) -> tuple[Hidden, MemoryState]:
        """x: [b, t, d] → x after the block, and the memory's state after the last token."""
        read, after = self.memory(self.memory_norm(x), state, resets)
        x = x + self.memory_out_norm(read)
        return x + self.mlp_out_norm(self.mlp(self.mlp_norm(x))), after

    def residual_writers(self) -> tuple[nn.Linear, nn.Linear]:
        """The two linear maps whose outputs are added to the residual stream."""
        return self.memory.o_proj, self.mlp.down_proj
