"""φ and the rotary embedding in C++, in one pass over the numbers (`hqlt/native/rows.h`). The backward pass saves the
inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hqlt import native
from hqlt.ops.backend import register_backend
from hqlt.ops.features import reference
from hqlt.ops.second_order import differentiable_twice
from hqlt.shapes import Keys


@register_backend("unit_silu", "native")
def unit_silu(x: Keys) -> Keys:
    return (_unit_silu if native.may_run(x) else _unit_silu_op)(x)


@register_backend("rotated", "native")
def rotated(x: Keys, cos: Tensor, sin: Tensor) -> Keys:
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        return reference.rotated(x, cos, sin)  # the kernel has no gradient of the angles
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return (_rotate if native.may_run(x, cos, sin) else _rotate_op)(x, cos, sin, 1.0)


def _unit_silu(x: Tensor) -> Tensor:
    (x,) = native.contiguous(x)
    y = torch.empty_like(x)
    native.run("unit_silu_forward", 1e-6, (x, y))
    return y


_unit_silu_op = torch.library.custom_op("hqlt::unit_silu", _unit_silu, mutates_args=())


@torch.library.custom_op("hqlt::unit_silu_backward", mutates_args=())
def _unit_silu_backward(x: Tensor, d_y: Tensor) -> Tensor:
    x, d_y = native.contiguous(x, d_y)
    d_x = torch.empty_like(x)
    native.run("unit_silu_backward", 1e-6, (x, d_y, d_x))
    return d_x


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, direction: float) -> Tensor:
    """direction: 1 applies the rotary embedding, −1 its inverse."""
    x, cos, sin = native.contiguous(x, cos, sin)
    y = torch.empty_like(x)
    native.run("rotate_forward", direction, (x, cos, sin, y))
    return y


_rotate_op = torch.library.custom_op("hqlt::rotate", _rotate, mutates_args=())


@_unit_silu_op.register_fake
@_unit_silu_backward.register_fake
@_rotate_op.register_fake
def _(x, *others):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)


def _keep_x(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _keep_angles(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, ctx.direction = inputs
    ctx.save_for_backward(cos, sin)


_unit_silu_op.register_autograd(lambda ctx, d_y: _unit_silu_backward(*ctx.saved_tensors, d_y), setup_context=_keep_x)
_rotate_op.register_autograd(
    lambda ctx, d_y: (_rotate_op(d_y, *ctx.saved_tensors, -ctx.direction), None, None, None),
    setup_context=_keep_angles,
)
differentiable_twice(_unit_silu_backward, lambda _: reference.unit_silu, inputs=(0,), d_outputs=(1,))
