"""Fast weights in C++, write by write, with a slice of the matrix in the CPU cache (`hqlt/native/fast_weights.h`).

Besides its inputs, the forward pass saves only the errors v − Sᵀa, which are as large as v. From them, the backward
pass rebuilds each matrix by decays and additions alone. Additive rules, whose errors are the values, save nothing more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hqlt import native
from hqlt.ops.backend import register_backend
from hqlt.ops.fast_weights import reference
from hqlt.ops.fast_weights.steps import Decay, Erase
from hqlt.ops.second_order import differentiable_twice
from hqlt.shapes import Keys, Live, Matrix, Queries, Resets, Strengths, Values


@register_backend("fast_weights", "native")
def fast_weights(
    q: Queries,
    k: Keys,
    v: Values,
    beta: Strengths,
    decay: Decay | None,
    erase: Erase,
    *,
    scale: float,
    state: Matrix,
    resets: Resets | None,
    live: Live | None,
    errors: bool = False,
) -> tuple[Any, ...]:
    erases, a = (erase, None) if isinstance(erase, bool) else (True, erase)
    if decay is None and erase is False:
        decay = q.new_zeros(q.shape[0], q.shape[1], k.shape[2])  # saves building a kernel for this case
    q, k, v, beta = native.cast(state.dtype, q, k, v, beta)
    decay, a = (x if x is None else native.cast(state.dtype, x)[0] for x in (decay, a))
    plain = native.may_run(q, k, v, beta, decay, a, state, resets, live)
    run = _run if plain else _forward
    out, state, e = run(q, k, v, beta, decay, a, state, resets, live, erases, scale, errors or not plain)
    return (out, state, e if erases else v.detach()) if errors else (out, state)


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor | None,
    a: Tensor | None,
    state: Tensor,
    resets: Tensor | None,
    live: Tensor | None,
    erases: bool,
    scale: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the output, the final state and the errors [b, m·t, h, v] (empty unless `keep`).

    a: the key to erase, if it is not k.
    """
    tensors = _tensors(q, k, v, beta, decay, a, state, resets, live, erases)
    out, final = v.new_empty(*q.shape[:3], v.shape[3]), torch.empty_like(tensors[7])
    errors = torch.empty_like(tensors[2]) if keep and erases else None
    native.run("fast_weights_forward", scale, (*tensors, out, final, errors))
    return out, final, v.new_empty(0) if errors is None else errors


def _tensors(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor | None,
    a: Tensor | None,
    state: Tensor,
    resets: Tensor | None,
    live: Tensor | None,
    erases: bool,
) -> list[Any]:
    """The tensors that both kernels take: α per matrix and α per row, of which one is None, and the key to erase or
    None."""
    q, k, v, beta, a, state, resets, live = native.contiguous(q, k, v, beta, a, state, resets, live)
    alpha = decay if decay is None else decay.contiguous().exp()
    return [q, k, v, beta, *_by_kind(alpha), k if erases and a is None else a, state, resets, live]


def _by_kind(decay: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """(decay per matrix, decay per row), of which at least one is None."""
    return (None, decay) if decay is not None and decay.dim() == 4 else (decay, None)


_forward = torch.library.custom_op("hqlt::fast_weights", _run, mutates_args=())


@_forward.register_fake
def _(q, k, v, beta, decay, a, state, resets, live, erases, scale, keep):  # type: ignore[no-untyped-def]
    errors = v.new_empty(v.shape if keep and erases else 0)
    return v.new_empty(*q.shape[:3], v.shape[3]), state.new_empty(state.shape), errors


@torch.library.custom_op("hqlt::fast_weights_backward", mutates_args=())
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor | None,
    a: Tensor | None,
    state: Tensor,
    resets: Tensor | None,
    live: Tensor | None,
    errors: Tensor | None,
    out: Tensor | None,
    final: Tensor | None,
    d_out: Tensor,
    d_final: Tensor,
    erases: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns dq, dk, dv, dβ, d log α and da (both empty if there is none), and the gradient of the initial state.

    errors is needed if the rule erases, out for a decay per matrix, and final for any decay.
    """
    tensors = _tensors(q, k, v, beta, decay, a, state, resets, live, erases)
    saved = native.contiguous(errors, out, final, d_out, d_final)
    like = *tensors[:4], decay, a, tensors[7]
    gradients = [None if x is None else x.new_empty(x.shape) for x in like]
    dq, dk, dv, d_beta, d_decay, da, d_state = gradients
    native.run("fast_weights_backward", scale, (*tensors, *saved, dq, dk, dv, d_beta, *_by_kind(d_decay), da, d_state))
    return tuple(q.new_empty(0) if x is None else x for x in gradients)  # type: ignore[return-value]


@_backward.register_fake
def _(q, k, v, beta, decay, a, state, *others):  # type: ignore[no-untyped-def]
    return tuple(q.new_empty(0 if x is None else x.shape) for x in (q, k, v, beta, decay, a, state))


def _equation(arguments: Any) -> Any:
    decay, a, resets, live, erases, scale = (arguments[i] for i in (4, 5, 7, 8, 14, 15))

    def equation(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
        *decay_and_a, state = others
        d = decay_and_a.pop(0) if decay is not None else None
        erase = decay_and_a.pop() if a is not None else erases
        return reference.fast_weights(q, k, v, beta, d, erase, scale=scale, state=state, resets=resets, live=live)

    return equation


differentiable_twice(_backward, _equation, inputs=range(7), d_outputs=(12, 13))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *saved, ctx.erases, ctx.scale, _ = inputs
    out, final, errors = output
    decay = saved[4]
    out_or_none = out if decay is not None and decay.dim() == 3 else None
    ctx.save_for_backward(*saved, errors, out_or_none, final if decay is not None else None)
    ctx.mark_non_differentiable(errors)


def _gradients(ctx: Any, d_out: Tensor, d_final: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *inputs, errors, out, final = ctx.saved_tensors
    if ctx.erases and errors.numel() == 0:
        errors = _forward(*inputs, ctx.erases, ctx.scale, True)[2]
    errors_or_none = errors if ctx.erases else None
    *gradients, d_state = _backward(*inputs, errors_or_none, out, final, d_out, d_final, ctx.erases, ctx.scale)
    gradients = [g if x is not None else None for g, x in zip(gradients, inputs, strict=False)]
    return *gradients, d_state, None, None, None, None, None


_forward.register_autograd(_gradients, setup_context=_setup_context)
