"""Window attention in C++: a vector's width of queries at a time against the pairs that they reach
(`hqlt/native/window_attention.h`). The backward pass keeps q, k and v alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hqlt import native
from hqlt.ops.backend import register_backend
from hqlt.ops.second_order import differentiable_twice
from hqlt.ops.window_attention import blocked_beyond, reference
from hqlt.ops.window_attention.beyond import Beyond
from hqlt.shapes import Keys, Queries, Resets, Values, at_least_float32


@register_backend("window_attention", "native")
def window_attention(
    q: Queries,
    k: Keys,
    v: Values,
    *,
    window: int,
    scale: float,
    resets: Resets | None,
    beyond: Beyond | None = None,
) -> Values:
    if beyond is not None:
        return blocked_beyond.window_attention(q, k, v, window=window, scale=scale, resets=resets, beyond=beyond)
    dtype = q.dtype
    q, k, v = native.cast(at_least_float32(dtype), q, k, v)
    run = _run if native.may_run(q, k, v, resets) else _forward
    return run(q, k, v, resets, window, scale).to(dtype)


def _run(q: Tensor, k: Tensor, v: Tensor, resets: Tensor | None, window: int, scale: float) -> Tensor:
    inputs = native.contiguous(q, k, v, resets)
    out = q.new_empty(*q.shape[:3], v.shape[3])
    native.run("window_attention_forward", scale, (*inputs, out), min(window, k.shape[1]))
    return out


_forward = torch.library.custom_op("hqlt::window_attention", _run, mutates_args=())


@_forward.register_fake
def _(q, k, v, resets, window, scale):  # type: ignore[no-untyped-def]
    return q.new_empty(*q.shape[:3], v.shape[3])


@torch.library.custom_op("hqlt::window_attention_backward", mutates_args=())
def _backward(
    q: Tensor, k: Tensor, v: Tensor, resets: Tensor | None, d_out: Tensor, window: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """→ dq, dk, dv."""
    inputs = native.contiguous(q, k, v, resets, d_out)
    grads = torch.empty_like(inputs[0]), torch.zeros_like(inputs[1]), torch.zeros_like(inputs[2])
    native.run("window_attention_backward", scale, (*inputs, *grads), min(window, k.shape[1]))
    return grads


@_backward.register_fake
def _(q, k, v, resets, d_out, window, scale):  # type: ignore[no-untyped-def]
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _equation(arguments: Any) -> Any:
    *_, resets, _, window, scale = arguments
    return lambda q, k, v: reference.window_attention(q, k, v, window=window, scale=scale, resets=resets)


differentiable_twice(_backward, _equation, inputs=range(3), d_outputs=(4,))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *saved, ctx.window, ctx.scale = inputs
    ctx.save_for_backward(*saved)


def _gradients(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(*ctx.saved_tensors, d_out, ctx.window, ctx.scale), None, None, None


_forward.register_autograd(_gradients, setup_context=_setup_context)
