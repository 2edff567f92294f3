"""The delta rule in C++, token by token, with a slice of the matrix in the CPU cache (`hqlt/native/delta_rule.h`).

Besides its inputs, the forward pass saves only the errors v_t − W_{t−1}ᵀk_t, which are as large as v. From them, the
backward pass rebuilds each W_t by additions alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hqlt import native
from hqlt.ops.backend import register_backend
from hqlt.ops.delta_rule import reference
from hqlt.ops.second_order import differentiable_twice
from hqlt.shapes import Keys, Live, Matrix, Queries, Resets, Strengths, Values


@register_backend("delta_rule", "native")
def delta_rule(
    q: Queries,
    k: Keys,
    v: Values,
    beta: Strengths,
    *,
    scale: float,
    state: Matrix,
    resets: Resets | None,
    live: Live | None,
) -> tuple[Values, Matrix]:
    q, k, v, beta = native.cast(state.dtype, q, k, v, beta)
    plain = native.may_run(q, k, v, beta, state, resets, live)
    out, state, _ = (_run if plain else _forward)(q, k, v, beta, state, resets, live, scale, not plain)
    return out, state


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    state: Tensor,
    resets: Tensor | None,
    live: Tensor | None,
    scale: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the output, the final state and the errors [b, t, h, v] (empty unless `keep`)."""
    inputs = native.contiguous(q, k, v, beta, state, resets, live)
    out, final = v.new_empty(*q.shape[:3], v.shape[3]), torch.empty_like(inputs[4])
    errors = torch.empty_like(inputs[2]) if keep else v.new_empty(0)
    kept = errors if keep else None
    native.run("delta_rule_forward", scale, (*inputs, out, final, kept))
    return out, final, errors


_forward = torch.library.custom_op("hqlt::delta_rule", _run, mutates_args=())


@_forward.register_fake
def _(q, k, v, beta, state, resets, live, scale, keep):  # type: ignore[no-untyped-def]
    return v.new_empty(*q.shape[:3], v.shape[3]), state.new_empty(state.shape), v.new_empty(v.shape if keep else 0)


@torch.library.custom_op("hqlt::delta_rule_backward", mutates_args=())
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    state: Tensor,
    resets: Tensor | None,
    live: Tensor | None,
    errors: Tensor,
    d_out: Tensor,
    d_final: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns dq, dk, dv, dβ and the gradient of the initial state. v is used by second derivatives only."""
    inputs = native.contiguous(q, k, beta, state, resets, live, errors, d_out, d_final)
    q, k, beta, state, _, _, errors, *_ = inputs
    dq, dk, dv, d_beta, d_state = (torch.empty_like(x) for x in (q, k, errors, beta, state))
    native.run("delta_rule_backward", scale, (*inputs, dq, dk, dv, d_beta, d_state))
    return dq, dk, dv, d_beta, d_state


@_backward.register_fake
def _(q, k, v, beta, state, resets, live, errors, d_out, d_final, scale):  # type: ignore[no-untyped-def]
    return tuple(x.new_empty(x.shape) for x in (q, k, v, beta, state))


def _equation(arguments: Any) -> Any:
    resets, scale = arguments[5], arguments[-1]
    return lambda q, k, v, beta, state: reference.delta_rule(
        q, k, v, beta, scale=scale, state=state, resets=resets, live=None
    )


differentiable_twice(_backward, _equation, inputs=range(5), d_outputs=(8, 9))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *saved, ctx.scale, _ = inputs
    errors = output[2]
    ctx.save_for_backward(*saved, errors)
    ctx.mark_non_differentiable(errors)


def _gradients(ctx: Any, d_out: Tensor, d_final: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *inputs, errors = ctx.saved_tensors
    if errors.numel() == 0:
        errors = _forward(*inputs, ctx.scale, True)[2]
    return *_backward(*inputs, errors, d_out, d_final, ctx.scale), None, None, None, None


_forward.register_autograd(_gradients, setup_context=_setup_context)
