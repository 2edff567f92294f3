"""Cross-entropy over the vocabulary in chunks of positions, without materializing logits [b, t, vocabulary]."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hqlt.layer.parts import has_hooks
from hqlt.native import is_transformed
from hqlt.shapes import Hidden, at_least_float32

IGNORE = -100
MAX_LOGITS = 2**26
"""Logits that may exist at the same time: 256 MiB of float32. Fewer are computed in one chunk."""


def summed_cross_entropy(x: Hidden, head: nn.Module, targets: Tensor, max_logits: int = MAX_LOGITS) -> Tensor:
    """Summed cross-entropy of a language model's head, in at least float32.

        Σ −log softmax(head(x))[target]     over the positions whose target is not −100

    If gradients are needed, they are computed together with the loss, so that no logit is computed twice.

    Args:
        x ([b, t, d]): the inputs of the head.
        head: the output head. Unless it is a plain matrix (hooks, a bias, an adapter, a sharded or quantized weight),
            it is called once with all positions.
        targets ([b, t]): the token to predict at each position.
        max_logits: number of logits that may exist at the same time.

    Returns:
        The loss, a scalar.
    """
    vocabulary = getattr(head, "out_features", 0)
    if x[..., 0].numel() * vocabulary <= max_logits or not _is_plain_matrix(head) or is_transformed():
        logits = head(x)
        wide = logits.to(at_least_float32(logits.dtype))
        return F.cross_entropy(wide.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
    assert isinstance(head.weight, Tensor)
    rows = max(max_logits // vocabulary, 1)
    loss: Tensor = _SummedCrossEntropy.apply(x.flatten(0, 1), head.weight, targets.flatten(), rows)
    return loss


def _is_plain_matrix(head: nn.Module) -> bool:
    if type(head) is not nn.Linear or has_hooks(head) or "bias" in dict(head.named_parameters(recurse=False)):
        return False
    return not is_traceable_wrapper_subclass(head.weight)


class _SummedCrossEntropy(torch.autograd.Function):
    """dx = P W and dW = Pᵀ x, where P = softmax(x Wᵀ) − onehot(target) at the scored positions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, rows: int) -> Tensor:
        """x: [n, d], weight: [vocabulary, d], targets: [n]."""
        if torch.is_autocast_enabled(x.device.type):
            x, weight = (y.to(torch.get_autocast_dtype(x.device.type)) for y in (x, weight))
        wants_x, wants_weight = ctx.needs_input_grad[:2]
        wide = at_least_float32(x.dtype)
        loss = x.new_zeros((), dtype=wide)
        dx = torch.empty_like(x) if wants_x else None
        d_weight = torch.zeros_like(weight, dtype=wide) if wants_weight else None
        for begin in range(0, len(x), rows):
            part = slice(begin, begin + rows)
            scored = (targets[part] != IGNORE)[:, None]
            target = targets[part, None].clamp(min=0)
            log_p = torch.log_softmax(x[part] @ weight.mT, dim=-1, dtype=wide)
            at_target = log_p.gather(1, target)
            loss = loss - at_target.masked_fill(~scored, 0).sum()
            if not (wants_x or wants_weight):
                continue
            P = torch.exp(log_p, out=torch.empty_like(log_p, dtype=x.dtype))
            P.scatter_(1, target, at_target.expm1().to(x.dtype))
            if dx is not None:
                dx[part] = (P @ weight).masked_fill(~scored, 0)
            if d_weight is not None:
                d_weight += P.mT @ x[part].masked_fill(~scored, 0)
        ctx.save_for_backward(dx, d_weight)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        grads = (None if grad is None else (d_loss * grad).to(grad.dtype) for grad in ctx.saved_tensors)
        return *grads, None, None
