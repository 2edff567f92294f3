"""RMSNorm modules."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from hqlt.memory import Heads
from hqlt.ops import rms_norm
from hqlt.registry import check_choice
from hqlt.shapes import Values


class RMSNorm(nn.RMSNorm):
    """RMSNorm over the last axis, weight ⊙ x / √(mean x² + eps), in the dtype of its weight.

    Args:
        width: size of the last axis.
        eps: ε under the root.

    Example:
        >>> import torch
        >>> from hqlt.layer import RMSNorm
        >>> RMSNorm(4, eps=0.0)(torch.tensor([2.0, 2.0, 2.0, -2.0])).tolist()
        [1.0, 1.0, 1.0, -1.0]
    """

    native = "rms"
    eps: float

    def __init__(self, width: int, eps: float) -> None:
        super().__init__(width, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, eps=self.eps)

    if TYPE_CHECKING:
        __call__ = forward


class ZeroCenteredRMSNorm(RMSNorm):
    """RMSNorm with the factor 1 + weight, (1 + weight) ⊙ x / √(mean x² + eps). The weight is initialized to 0.

    Example:
        >>> from hqlt.layer import ZeroCenteredRMSNorm
        >>> ZeroCenteredRMSNorm(4, eps=1e-6).weight.tolist()
        [0.0, 0.0, 0.0, 0.0]
    """

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, 1 + self.weight, eps=self.eps)


class GroupedRMSNorm(RMSNorm):
    """RMSNorm over groups of adjacent heads, with one weight per channel."""

    def __init__(self, heads: int, width: int, groups: int, eps: float) -> None:
        super().__init__(heads * width, eps)
        self.groups = groups

    def forward(self, x: Values) -> Values:
        """Normalize x [b, t, heads, width]."""
        groups = x.to(self.weight.dtype).flatten(2).unflatten(2, (self.groups, -1))
        return (F.rms_norm(groups, groups.shape[-1:], eps=self.eps).flatten(2) * self.weight).view_as(x)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, groups={self.groups}"


HEAD_NORMS = ("head", "group", "full")


def head_norms(
    kind: bool | str, heads: Heads, eps: float, gate: bool | str, after_gate: bool
) -> tuple[nn.Module, nn.Module | None]:
    """Return the norm before the output gate and the norm after it; at most one of them does anything.

    `kind` is "head" (or True) for a norm over each head with shared weights, "group" for one over the value heads that
    share a key head, "full" for one over all heads (both with one weight per channel), or False for no norm.
    """
    if after_gate and not (gate and kind):
        raise ValueError("norm_after_gate: expected together with output_gate and head_norm, got it without")
    if kind is False:
        return nn.Identity(), None
    kind = "head" if kind is True else kind
    check_choice("head_norm", kind, HEAD_NORMS)
    groups = {"group": heads.keys, "full": 1}
    norm = RMSNorm(heads.v, eps) if kind == "head" else GroupedRMSNorm(heads.reads, heads.v, groups[kind], eps)
    return (nn.Identity(), norm) if after_gate else (norm, None)
