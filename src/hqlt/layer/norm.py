"""RMSNorm as a module."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from hqlt.memory import Heads
from hqlt.ops import rms_norm
from hqlt.registry import check_choice
from hqlt.shapes import Values


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


class GroupedRMSNorm(RMSNorm):
    """RMSNorm over groups of neighbouring heads, in which every number has a weight of its own."""

    def __init__(self, heads: int, width: int, groups: int, eps: float) -> None:
        super().__init__(heads * width, eps)
        self.groups = groups

    def forward(self, x: Values) -> Values:
        """[b, t, heads, width], shaped as it was."""
        groups = x.to(self.weight.dtype).flatten(2).unflatten(2, (self.groups, -1))
        return (F.rms_norm(groups, groups.shape[-1:], eps=self.eps).flatten(2) * self.weight).view_as(x)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, groups={self.groups}"


HEAD_NORMS = ("head", "group", "full")


def head_norms(
    kind: bool | str, heads: Heads, eps: float, gate: bool | str, after_gate: bool
) -> tuple[nn.Module, nn.Module | None]:
    """The norm before the output gate and the one after it, of which one at most does anything.

    kind: over each "head" (or True), which share a weight; over all heads of values that share a key head ("group"), or
    over all ("full"), with a weight for each number; False: none.
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
