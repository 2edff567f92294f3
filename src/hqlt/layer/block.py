"""The residual block: a hybrid memory layer, then an MLP."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import nn

from hqlt.layer.layer import HybridMemory
from hqlt.layer.norm import RMSNorm, ZeroCenteredRMSNorm
from hqlt.memory import MemoryState
from hqlt.registry import check_choice
from hqlt.shapes import Hidden, Resets


class SwiGLU(nn.Module):
    """The gated MLP W_down (SiLU(W_gate x) ⊙ W_up x).

    Args:
        hidden_size: width of the input and the output.
        intermediate_size: width in between.
        bias: whether the three projections have biases.

    Source:
        Shazeer 2020, "GLU Variants Improve Transformer", eq. 6.

    Example:
        >>> import torch
        >>> from hqlt.layer import SwiGLU
        >>> SwiGLU(64, 256)(torch.randn(2, 5, 64)).shape
        torch.Size([2, 5, 64])
    """

    def __init__(self, hidden_size: int, intermediate_size: int, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: Hidden) -> Hidden:
        out: Hidden = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out

    if TYPE_CHECKING:
        __call__ = forward


BLOCK_NORMS = {"before": (True, False), "after": (False, True), "both": (True, True)}
"""By name: whether a block normalizes the inputs of its two parts, and whether it normalizes their outputs."""


class Block(nn.Module):
    """A residual block: x ← x + memory(RMSNorm(x)), then x ← x + mlp(RMSNorm(x)).

    Args:
        memory: the hybrid memory layer.
        mlp: the MLP.
        norm_eps: ε of the norms.
        norms: position of the norms: "before" each part, as above; "after" it, x + RMSNorm(memory(x)); or "both".
        zero_centered: whether the weights of the norms are 1 + w.

    Example:
        >>> import torch, hqlt
        >>> from hqlt.layer import Block, SwiGLU
        >>> block = Block(hqlt.HybridMemory(64, 4), SwiGLU(64, 256), norm_eps=1e-6)
        >>> y, state = block(torch.randn(2, 5, 64))
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
        """Process a batch of sequences.

        Args:
            x ([b, t, d]): the inputs.
            resets (Bool[b, t]): True for each token that begins a new segment. Default: no resets.
            state: the state returned by an earlier call. Default: empty memories.

        Returns:
            The outputs [b, t, d], and the state after the last token.
        """
        read, after = self.memory(self.memory_norm(x), state, resets)
        x = x + self.memory_out_norm(read)
        return x + self.mlp_out_norm(self.mlp(self.mlp_norm(x))), after

    if TYPE_CHECKING:
        __call__ = forward

    def residual_writers(self) -> tuple[nn.Linear, nn.Linear]:
        """Return the two linear maps whose outputs are added to the residual stream."""
        return self.memory.o_proj, self.mlp.down_proj
