"""The operators and the kernels that they launch, in order: three forward, three backward.

    forward    prepare            k, v, β → φK, (I + L)⁻¹, Y, U             each chunk independently
               carry              φK, Y, U → R, S                           a loop over chunks
               read               q, k, v, φK, R, S, gate → y               fw, kv, mixer and norm of each chunk
    backward   queries_backward   q, k, v, φK, R, S, gate, dy → dq, dgate, dnorm, dfw, dkv, dR
               carry_backward     q, φK, Y, dR, dfw → dS', and more dR      a loop over chunks, in reverse
               entries_backward   q, k, v, φK, (I + L)⁻¹, R, S, dkv, dfw, dR, dS' → dk, dv, dβ

φK, (I + L)⁻¹, Y, R and S are outputs of the forward operator, so that they are kept only if there will be a backward
pass. Sums are in at least float32. Factors of matrix products, and tensors passed between kernels, have the inputs'
dtype. Both directions are PyTorch operators, so that torch.compile and checkpointing see one node each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hqlt.native import contiguous
from hqlt.ops.segments import segment_ids
from hqlt.ops.synchronous.kernels import attention, delta_rule, delta_rule_backward, reads, step
from hqlt.ops.synchronous.kernels.launch import Call, call, chunk_of
from hqlt.ops.synchronous.kernels.nonfinite import finite_rows, lost_tokens, reached_entries, zeroed
from hqlt.shapes import at_least_float32


def _ids(k: Tensor, resets: Tensor | None) -> Tensor:
    return k.new_zeros(k.shape[:2], dtype=torch.int32) if resets is None else segment_ids(resets).int()


def _far(kernels: Call, k: Tensor, expiry: Tensor | None, most: int) -> Tensor | None:
    """The entries beyond the window that each chunk of queries may read; None if none stay visible."""
    if expiry is None:
        return None
    far = k.new_empty(kernels.b, kernels.chunks, kernels.h, most, dtype=torch.int32)
    kernels.each_head(attention.list_far, expiry, far)
    return far


def run_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    gate: Tensor,
    norm_weight: Tensor,
    state: Tensor,
    decay: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    resets: Tensor | None,
    expiry: Tensor | None,
    window: int,
    scale: float,
    norm_eps: float,
    most: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns y [b, t, g·h, v] and the final matrix [b, h, k, v]; for the backward pass, φK, (I + L)⁻¹, Y, R, S and, if
    there are resets, the lost tokens (`nonfinite.py`; empty without resets)."""
    inputs = contiguous(q, k, v, beta, gate, norm_weight, state, decay, cos, sin, expiry)
    q, k, v, beta, gate, norm_weight, state, decay, cos, sin, expiry = inputs
    ids = _ids(k, resets)
    kernels = call(q, k, v, most, window=window, scale=scale, norm_eps=norm_eps)
    far = _far(kernels, k, expiry, most)
    y, final, unit_k, inverse, Y, R, S, none = _outputs(q, k, v, beta, gate, norm_weight, state)
    lost = None if resets is None else lost_tokens(k, v, beta, decay, state, resets)
    if lost is not None:
        (beta, decay), state = zeroed(beta, decay), torch.where(state.isfinite(), state, 0)
    kernels.each_chunk(delta_rule.prepare, k, v, beta, decay, ids, lost, unit_k, inverse, Y, R)
    kernels.each_slice(delta_rule.carry, unit_k, Y, R, decay, ids, state, S, final)
    kernels.each_chunk_of_queries(
        reads.read, q, k, v, gate, norm_weight, decay, cos, sin, expiry, far, ids, lost, unit_k, R, S, y
    )  # fmt: skip
    if lost is not None:
        final.masked_fill_(lost[:, -1, :, None, None] != 0, torch.nan)
    return y, final, unit_k, inverse, Y, R, S, none if lost is None else lost


def _outputs(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, gate: Tensor, norm_weight: Tensor, state: Tensor,
    decay: Tensor | None = None, cos: Tensor | None = None, sin: Tensor | None = None, resets: Tensor | None = None,
    *_: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    b, t, h = beta.shape
    c, (width, v_width) = chunk_of(q, v), state.shape[2:]
    unit_k, Y = (k.new_empty(b, t, h, width) for _ in range(2))
    inverse, R, S = (x.new_empty(sizes) for x, sizes in (
        (k, (b, t, h, c)), (v, (b, t, h, v_width)), (v, (b, -(-t // c), h, width, v_width))
    ))  # fmt: skip
    lost = beta.new_empty(0 if resets is None else beta.shape, dtype=torch.int8)
    return gate.new_empty(gate.shape), state.new_empty(state.shape), unit_k, inverse, Y, R, S, lost


forward = torch.library.custom_op("hqlt::synchronous", run_forward, mutates_args=())
forward.register_fake(_outputs)


def run_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    gate: Tensor,
    norm_weight: Tensor,
    decay: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    resets: Tensor | None,
    expiry: Tensor | None,
    unit_k: Tensor,
    inverse: Tensor,
    Y: Tensor,
    R: Tensor,
    S: Tensor,
    lost: Tensor,
    dy: Tensor,
    d_final: Tensor,
    window: int,
    scale: float,
    norm_eps: float,
    most: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of q, k, v, β, gate, norm weight, initial matrix and decay (empty without decay)."""
    inputs = contiguous(q, k, v, beta, gate, norm_weight, decay, cos, sin, expiry, dy, d_final)
    q, k, v, beta, gate, norm_weight, decay, cos, sin, expiry, dy, d_final = inputs
    ids = _ids(k, resets)
    kernels = call(q, k, v, most, window=window, scale=scale, norm_eps=norm_eps)
    far = _far(kernels, k, expiry, most)
    (b, t, heads, _), wide = q.shape, at_least_float32(q.dtype)
    dq, dk, dv, d_beta, d_gate, d_state = (torch.empty_like(x) for x in (q, k, v, beta, gate, d_final))
    d_fw, d_kv, dR, d_after = (torch.empty_like(x) for x in (gate, gate, gate, S))
    d_weight = v.new_empty(b, kernels.chunks, heads, v.shape[3], dtype=wide)
    log_total, kv_slope = (v.new_empty(b, heads, t, dtype=wide) for _ in range(2))
    d_log_read, d_decay = None if decay is None else torch.empty_like(kv_slope), _gradient_of(decay, beta)
    marks = dead = reached = None
    if resets is not None:
        marks, dead = lost, torch.empty_like(kv_slope, dtype=torch.int8)
        dead_final = (lost[:, -1] != 0) | ~finite_rows(d_final.flatten(2))
        (beta, decay), d_final = zeroed(beta, decay), d_final.masked_fill(dead_final[..., None, None], 0)
    kernels.each_chunk_of_queries(
        reads.queries_backward, q, k, v, gate, norm_weight, decay, cos, sin, expiry, far, ids, marks, unit_k, R, S,
        dy, dq, d_gate, d_weight, d_fw, d_kv, dR, log_total, kv_slope, d_log_read, dead,
    )  # fmt: skip
    kernels.each_slice(
        delta_rule_backward.carry_backward, q, unit_k, Y, dR, decay, ids, marks, d_fw, d_final, d_after, d_state
    )  # fmt: skip
    if resets is not None and dead is not None:
        reached, reached_state = reached_entries(dead, dead_final, resets)
        d_state.masked_fill_(reached_state[..., None, None], torch.nan)
    kernels.each_chunk_of_entries(
        delta_rule_backward.entries_backward, q, k, v, beta, decay, cos, sin, expiry, ids, reached, unit_k, inverse, R,
        S, d_kv, d_fw, log_total, kv_slope, d_log_read, dR, d_after, dk, dv, d_beta, d_decay,
    )  # fmt: skip
    return dq, dk, dv, d_beta, d_gate, d_weight.sum(dim=(0, 1, 2)).to(norm_weight.dtype), d_state, d_decay


def _gradient_of(decay: Tensor | None, beta: Tensor) -> Tensor:
    return beta.new_empty(0) if decay is None else torch.empty_like(decay)


backward = torch.library.custom_op("hqlt::synchronous_backward", run_backward, mutates_args=())


@backward.register_fake
def _(q, k, v, beta, gate, norm_weight, decay, *others):
    d_final = others[11]
    gradients = (x.new_empty(x.shape) for x in (q, k, v, beta, gate, norm_weight, d_final))
    return *gradients, _gradient_of(decay, beta)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    saved = output[2:]
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)  # else autograd would allocate zeros as large as the saved outputs
    ctx.save_for_backward(*inputs[:6], *inputs[7:12], *saved)
    ctx.constants = inputs[12:]


def _gradients(ctx: Any, dy: Tensor | None, d_final: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    gate, decay, S = (ctx.saved_tensors[i] for i in (4, 6, -2))
    dy = torch.zeros_like(gate) if dy is None else dy
    if d_final is None:
        d_final = S.new_zeros(S.shape[:1] + S.shape[2:], dtype=at_least_float32(S.dtype))
    *gradients, d_decay = backward(*ctx.saved_tensors, dy, d_final, *ctx.constants)
    return *gradients, None if decay is None else d_decay, *(None,) * 8


forward.register_autograd(_gradients, setup_context=_setup_context)


def run_one_token(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    gate: Tensor,
    norm_weight: Tensor,
    decay: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    resets: Tensor | None,
    keys: Tensor,
    values: Tensor,
    matrix: Tensor,
    position: Tensor,
    scale: float,
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns y [b, 1, g·h, v], and keys, values, matrix and position after the token."""
    inputs = contiguous(q, k, v, beta, gate, norm_weight, decay, cos, sin, resets, keys, values, matrix, position)
    q, k, v, _, gate = inputs[:5]
    y, keys, values, matrix, position = (torch.empty_like(x) for x in (gate, *inputs[-4:]))
    kernels = call(q, k, v, slots=keys.shape[1], scale=scale, norm_eps=norm_eps)
    kernels.each_query_head(step.step, *inputs, y, keys, values, matrix, position)
    return y, keys, values, matrix, position


one_token = torch.library.custom_op("hqlt::synchronous_step", run_one_token, mutates_args=())


@one_token.register_fake
def _(q, k, v, beta, gate, norm_weight, decay, cos, sin, resets, *others):
    return tuple(x.new_empty(x.shape) for x in (gate, *others[:4]))
