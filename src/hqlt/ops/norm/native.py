"""RMSNorm, and the vector mixer fused with it, in C++, in one pass over the numbers (`hqlt/native/rows.h`). The
backward passes save only the inputs."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from hqlt import native
from hqlt.ops.backend import register_backend
from hqlt.ops.norm import reference
from hqlt.ops.second_order import differentiable_twice
from hqlt.shapes import Values


@register_backend("rms_norm", "native")
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return (_rms_norm if native.may_run(x, weight) else _rms_norm_op)(x, weight, eps)


@register_backend("mix", "native")
def mix(fw: Values, kv: Values, gate: Tensor, weight: Tensor, eps: float) -> Values:
    return (_mix if native.may_run(fw, kv, gate, weight) else _mix_op)(fw, kv, gate, weight, eps)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x, weight = native.contiguous(x, weight)
    y = torch.empty_like(x)
    native.run("rms_norm_forward", eps, (x, weight, y))
    return y


_rms_norm_op = torch.library.custom_op("hqlt::rms_norm", _rms_norm, mutates_args=())


@torch.library.custom_op("hqlt::rms_norm_backward", mutates_args=())
def _rms_norm_backward(x: Tensor, weight: Tensor, d_y: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Returns the gradients of x and weight."""
    x, weight, d_y = native.contiguous(x, weight, d_y)
    d_x, d_weight = torch.empty_like(x), torch.zeros_like(weight)
    native.run("rms_norm_backward", eps, (x, weight, d_y, d_x, d_weight))
    return d_x, d_weight


def _mix(fw: Tensor, kv: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    fw, kv, gate, weight = native.contiguous(fw, kv, gate, weight)
    y = torch.empty_like(fw)
    native.run("mix_forward", eps, (fw, kv, gate, weight, y))
    return y


_mix_op = torch.library.custom_op("hqlt::mix", _mix, mutates_args=())


@torch.library.custom_op("hqlt::mix_backward", mutates_args=())
def _mix_backward(
    fw: Tensor, kv: Tensor, gate: Tensor, weight: Tensor, d_y: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of fw, kv, gate and weight."""
    inputs = native.contiguous(fw, kv, gate, weight, d_y)
    d_fw, d_kv, d_gate = (torch.empty_like(x) for x in inputs[:3])
    d_weight = torch.zeros_like(weight)
    native.run("mix_backward", eps, (*inputs, d_fw, d_kv, d_gate, d_weight))
    return d_fw, d_kv, d_gate, d_weight


@_rms_norm_op.register_fake
@_mix_op.register_fake
def _(x, *others):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)


@_rms_norm_backward.register_fake
@_mix_backward.register_fake
def _(*tensors_and_eps):  # type: ignore[no-untyped-def]
    *inputs, _, _ = tensors_and_eps  # without the incoming gradient
    return tuple(x.new_empty(x.shape) for x in inputs)


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *saved, ctx.eps = inputs
    ctx.save_for_backward(*saved)


_rms_norm_op.register_autograd(
    lambda ctx, d_y: (*_rms_norm_backward(*ctx.saved_tensors, d_y, ctx.eps), None), setup_context=_keep_inputs
)
_mix_op.register_autograd(
    lambda ctx, d_y: (*_mix_backward(*ctx.saved_tensors, d_y, ctx.eps), None), setup_context=_keep_inputs
)
differentiable_twice(
    _rms_norm_backward, lambda args: partial(reference.rms_norm, eps=args[-1]), inputs=range(2), d_outputs=(2,)
)
differentiable_twice(_mix_backward, lambda args: partial(reference.mix, eps=args[-1]), inputs=range(4), d_outputs=(4,))
