"""RMSNorm as a module."""

from __future__ import annotations

from torch import Tensor, nn

from hqlt.ops import rms_norm


class RMSNorm(nn.RMSNorm):
    """weight ⊙ x / √(mean x² + eps) over the last axis, in the dtype of its weight (wider than x under autocast)."""

    eps: float

    def __init__(self, width: int, eps: float) -> None:
        super().__init__(width, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, eps=self.eps)
