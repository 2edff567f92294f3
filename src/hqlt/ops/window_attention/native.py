"""Window attention in C++, with one SIMD vector of queries at a time (`hqlt/native/window_attention.h`). The backward
pass saves only the inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hqlt import native
from hqlt.ops.backend import register_backend
from hqlt.ops.second_order import differentiable_twice
from hqlt.ops.window_attention import reference
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
    dtype = q.dtype
    q, k, v = native.cast(at_least_float32(dtype), q, k, v)
    expiry, most, q_far, k_far = (None, 0, None, None) if beyond is None else beyond
    if q_far is not None and k_far is not None:
        q_far, k_far = native.cast(q.dtype, q_far, k_far)
    inputs = q, k, v, resets, expiry, q_far, k_far
    run = _run if native.may_run(*inputs) else _forward
    return run(*inputs, window, most, scale).to(dtype)


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    resets: Tensor | None,
    expiry: Tensor | None,
    q_far: Tensor | None,
    k_far: Tensor | None,
    window: int,
    most: int,
    scale: float,
) -> Tensor:
    inputs = native.contiguous(q, k, v, resets, expiry, q_far, k_far)
    out = q.new_empty(*q.shape[:3], v.shape[3])
    native.run("window_attention_forward", scale, (*inputs, out), *_sizes(k, window, most))
    return out


def _sizes(k: Tensor, window: int, most: int) -> tuple[int, int]:
    """The window, and the maximum number of entries that a query sees."""
    l = k.shape[1]
    return min(window, l), min(window + most, l)


_forward = torch.library.custom_op("hqlt::window_attention", _run, mutates_args=())


@_forward.register_fake
def _(q, k, v, *others):  # type: ignore[no-untyped-def]
    return q.new_empty(*q.shape[:3], v.shape[3])


@torch.library.custom_op("hqlt::window_attention_backward", mutates_args=())
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    resets: Tensor | None,
    expiry: Tensor | None,
    q_far: Tensor | None,
    k_far: Tensor | None,
    d_out: Tensor,
    window: int,
    most: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns dq, dk, dv and the gradients of the queries and keys used beyond the window (both empty if there are
    none)."""
    inputs = native.contiguous(q, k, v, resets, expiry, q_far, k_far, d_out)
    dq, *others = torch.empty_like(inputs[0]), *(x.new_zeros(x.shape) for x in inputs[1:3])
    others += [None if x is None else x.new_zeros(x.shape) for x in inputs[5:7]]
    native.run("window_attention_backward", scale, (*inputs, dq, *others), *_sizes(k, window, most))
    return dq, *(q.new_empty(0) if x is None else x for x in others)  # type: ignore[return-value]


@_backward.register_fake
def _(q, k, v, resets, expiry, q_far, k_far, *others):  # type: ignore[no-untyped-def]
    return tuple(q.new_empty(0 if x is None else x.shape) for x in (q, k, v, q_far, k_far))


def _equation(arguments: Any) -> Any:
    resets, expiry, window, most, scale = (arguments[i] for i in (3, 4, 8, 9, 10))

    def equation(q: Tensor, k: Tensor, v: Tensor, *far: Tensor) -> Tensor:
        beyond = None if expiry is None else Beyond(expiry, most, *far)
        return reference.window_attention(q, k, v, window=window, scale=scale, resets=resets, beyond=beyond)

    return equation


differentiable_twice(_backward, _equation, inputs=(0, 1, 2, 5, 6), d_outputs=(7,))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *saved, ctx.window, ctx.most, ctx.scale = inputs
    ctx.save_for_backward(*saved)


def _gradients(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    inputs = ctx.saved_tensors
    *within, dq_far, dk_far = _backward(*inputs, d_out, ctx.window, ctx.most, ctx.scale)
    far = (None, None) if inputs[5] is None else (dq_far, dk_far)
    return *within, None, None, *far, None, None, None


_forward.register_autograd(_gradients, setup_context=_setup_context)
