"""Linear attention in C++, token by token, with a slice of the matrix in the CPU cache
(`hqlt/native/linear_attention.h`).

The backward pass saves the inputs and the output, and rebuilds each W_t by additions alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hqlt import native
from hqlt.ops.backend import register_backend
from hqlt.ops.linear_attention import reference
from hqlt.ops.linear_attention.state import EPSILON, LinearState
from hqlt.ops.second_order import differentiable_twice
from hqlt.shapes import Keys, Live, Queries, Resets, Values


@register_backend("linear_attention", "native")
def linear_attention(
    q: Queries, k: Keys, v: Values, *, state: LinearState, resets: Resets | None, live: Live | None
) -> tuple[Values, LinearState]:
    matrix, key_sum = state
    q, k, v = native.cast(matrix.dtype, q, k, v)
    run = _run if native.may_run(q, k, v, matrix, key_sum, resets, live) else _forward
    out, matrix, key_sum = run(q, k, v, matrix, key_sum, resets, live)
    return out, LinearState(matrix, key_sum)


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    matrix: Tensor,
    key_sum: Tensor,
    resets: Tensor | None,
    live: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the output, the final matrix and the final key sum."""
    inputs = native.contiguous(q, k, v, matrix, key_sum, resets, live)
    out = v.new_empty(*q.shape[:3], v.shape[3])
    matrix, key_sum = (torch.empty_like(x) for x in inputs[3:5])
    native.run("linear_attention_forward", EPSILON, (*inputs, out, matrix, key_sum))
    return out, matrix, key_sum


_forward = torch.library.custom_op("hqlt::linear_attention", _run, mutates_args=())


@_forward.register_fake
def _(q, k, v, matrix, key_sum, resets, live):  # type: ignore[no-untyped-def]
    return v.new_empty(*q.shape[:3], v.shape[3]), *(x.new_empty(x.shape) for x in (matrix, key_sum))


@torch.library.custom_op("hqlt::linear_attention_backward", mutates_args=())
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    matrix: Tensor,
    key_sum: Tensor,
    resets: Tensor | None,
    live: Tensor | None,
    out: Tensor,
    d_out: Tensor,
    d_matrix: Tensor,
    d_key_sum: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns dq, dk, dv and the gradients of the initial matrix and key sum."""
    inputs = native.contiguous(q, k, v, matrix, key_sum, resets, live, out, d_out, d_matrix, d_key_sum)
    dq, dk, dv, dW, dz = (torch.empty_like(x) for x in inputs[:5])
    native.run("linear_attention_backward", EPSILON, (*inputs, dq, dk, dv, dW, dz))
    return dq, dk, dv, dW, dz


@_backward.register_fake
def _(q, k, v, matrix, key_sum, resets, live, out, d_out, d_matrix, d_key_sum):  # type: ignore[no-untyped-def]
    return tuple(x.new_empty(x.shape) for x in (q, k, v, matrix, key_sum))


def _equation(arguments: Any) -> Any:
    def run(q: Tensor, k: Tensor, v: Tensor, matrix: Tensor, key_sum: Tensor) -> tuple[Tensor, ...]:
        state, (resets, live) = LinearState(matrix, key_sum), arguments[5:7]
        out, after = reference.linear_attention(q, k, v, state=state, resets=resets, live=live)
        return out, *after

    return run


differentiable_twice(_backward, _equation, inputs=range(5), d_outputs=(8, 9, 10))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, output[0])


def _gradients(ctx: Any, d_out: Tensor, d_matrix: Tensor, d_key_sum: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(*ctx.saved_tensors, d_out, d_matrix, d_key_sum), None, None


_forward.register_autograd(_gradients, setup_context=_setup_context)
