"""RMSNorm as a module."""

from __future__ import annotations

from torch import Tensor, nn

from hqlt.ops import rms_norm


class RMSNorm(nn.RMSNorm):
    """weight ⊙ x / √(mean x² + eps) over the last axis, in the dtype of its weight (wider than x under autocast)."""

    native = "rms"
    eps: float

    def __init__(self, width: int, eps: float) -> None:
        super().__init__(width, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, eps=self.eps)


class ZeroCenteredRMSNorm(RMSNorm):
    """(1 + weight) ⊙ x / √(mean x² + eps), begun at weight = 0."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, 1 + self.weight, eps=self.eps)
