"""The passes in their order: three forward, and eight backward of which two are forward's.

    forward    prepare          k, v, β → φ(k), (I + L)⁻¹, Y, U       each chunk by itself
               carry            φ(k), Y, U → R, S                     chunk after chunk
               read             q, k, v, φ(k), R, S, gate → y         fw, kv, mixer and norm, each chunk by itself
    backward   prepare and carry again, then
               mix_backward     q, k, v, φ(k), R, S, gate, dy → dfw, dkv, dgate, dnorm
               query_backward   q, k, v, dkv → dq                     attention
               key_backward     q, k, v, dkv → dk, dv
               read_backward    q, φ(k), R, S, dfw → dφ(k), dR, and more dq
               carry_backward   q, φ(k), Y, dR, dfw → dS', and more dR    chunk before chunk
               write_backward   k, v, φ(k), R, S, dφ(k), dR, dS' → dβ, and more dk, dv

Nothing but the inputs is kept for the backward pass. Sums are in at least float32; the factors of matrix products, and
what goes from one pass to the next, have the inputs' type. Both directions are operators of torch, so that its compiler
and its checkpointing see one node each.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hqlt.native import contiguous
from hqlt.ops.segments import segment_ids
from hqlt.ops.synchronous.kernels import attention, delta_rule, delta_rule_backward, reads, step
from hqlt.ops.synchronous.kernels.launch import Call, call
from hqlt.shapes import at_least_float32


class _Written(NamedTuple):
    """What the FW-memory's passes leave for the read."""

    unit_k: Tensor  # φ(k) [b, t, h, k]
    inverse: Tensor  # (I + L)⁻¹ [b, t, h, c]
    Y: Tensor  # [b, t, h, k]
    R: Tensor  # corrections [b, t, h, v]
    S: Tensor  # the matrix at each chunk's start [b, n, h, k, v]
    final: Tensor  # [b, h, k, v]


def _ids(k: Tensor, resets: Tensor | None) -> Tensor:
    return k.new_zeros(k.shape[:2], dtype=torch.int32) if resets is None else segment_ids(resets).int()


def _write(of: Call, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: Tensor, ids: Tensor) -> _Written:
    unit_k, Y = torch.empty_like(q), torch.empty_like(q)
    inverse, R = k.new_empty(*beta.shape, of.named["C"]), v.new_empty(*beta.shape, v.shape[3])
    S, final = v.new_empty(of.b, of.chunks, *state.shape[1:]), torch.empty_like(state)
    of.each_chunk(delta_rule.prepare, k, v, beta, ids, unit_k, inverse, Y, R)
    of.each_slice(delta_rule.carry, unit_k, Y, R, ids, state, S, final)
    return _Written(unit_k, inverse, Y, R, S, final)


def run_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    gate: Tensor,
    norm_weight: Tensor,
    state: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    resets: Tensor | None,
    window: int,
    scale: float,
    norm_eps: float,
) -> tuple[Tensor, Tensor]:
    """→ y [b, t, h, v], the final matrix [b, h, k, v]."""
    inputs = contiguous(q, k, v, beta, gate, norm_weight, state, cos, sin)
    q, k, v, beta, gate, norm_weight, state, cos, sin = inputs
    ids = _ids(k, resets)
    of = call(q, k, v, window=window, scale=scale, norm_eps=norm_eps)
    written = _write(of, q, k, v, beta, state, ids)
    y = torch.empty_like(gate)
    of.each_chunk(
        reads.read, q, k, v, gate, norm_weight, cos, sin, ids, written.unit_k, written.R, written.S, y
    )  # fmt: skip
    return y, written.final


forward = torch.library.custom_op("hqlt::synchronous", run_forward, mutates_args=())


@forward.register_fake
def _(q, k, v, beta, gate, norm_weight, state, cos, sin, resets, window, scale, norm_eps):
    return gate.new_empty(gate.shape), state.new_empty(state.shape)


def run_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    gate: Tensor,
    norm_weight: Tensor,
    state: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    resets: Tensor | None,
    dy: Tensor,
    d_final: Tensor,
    window: int,
    scale: float,
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """→ the gradients of q, k, v, β, gate, norm weight and initial matrix."""
    inputs = contiguous(q, k, v, beta, gate, norm_weight, state, cos, sin, dy, d_final)
    q, k, v, beta, gate, norm_weight, state, cos, sin, dy, d_final = inputs
    ids = _ids(k, resets)
    of = call(q, k, v, window=window, scale=scale, norm_eps=norm_eps)
    b, t, h, wide = *q.shape[:3], at_least_float32(q.dtype)
    dq, dk, dv, d_gate, d_fw, d_kv = (torch.empty_like(x) for x in (q, k, v, gate, gate, gate))
    d_weight = v.new_empty(b, of.chunks, h, v.shape[3], dtype=wide)
    log_total, kv_slope = (v.new_empty(b, h, t, dtype=wide) for _ in range(2))
    d_beta, d_state = torch.empty_like(beta), torch.empty_like(state)
    unit_k, inverse, Y, R, S, _ = _write(of, q, k, v, beta, state, ids)
    d_unit_k, dR, d_after = (torch.empty_like(x) for x in (unit_k, R, S))
    of.each_chunk(
        reads.mix_backward, q, k, v, gate, norm_weight, cos, sin, ids, unit_k, R, S, dy,
        d_gate, d_weight, d_fw, d_kv, log_total, kv_slope,
    )  # fmt: skip
    attended = q, k, v, cos, sin, ids, d_kv, log_total, kv_slope
    of.each_chunk(attention.query_backward, *attended, dq)
    of.each_chunk_of_keys(attention.key_backward, *attended, dk, dv)
    of.each_chunk(delta_rule_backward.read_backward, q, ids, unit_k, R, S, d_fw, dq, d_unit_k, dR)
    of.each_slice(
        delta_rule_backward.carry_backward, q, unit_k, Y, dR, ids, d_fw, d_final, d_after, d_state
    )  # fmt: skip
    of.each_chunk(
        delta_rule_backward.write_backward, k, v, beta, ids, unit_k, inverse, R, S, dR, d_after, d_unit_k, dk, dv,
        d_beta,
    )  # fmt: skip
    return dq, dk, dv, d_beta, d_gate, d_weight.sum(dim=(0, 1, 2)).to(norm_weight.dtype), d_state


backward = torch.library.custom_op("hqlt::synchronous_backward", run_backward, mutates_args=())


@backward.register_fake
def _(q, k, v, beta, gate, norm_weight, state, *_):
    return tuple(x.new_empty(x.shape) for x in (q, k, v, beta, gate, norm_weight, state))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:10])
    ctx.constants = inputs[10:]


def _gradients(ctx: Any, dy: Tensor, d_final: Tensor) -> tuple[Tensor | None, ...]:
    return *backward(*ctx.saved_tensors, dy, d_final, *ctx.constants), *(None,) * 6


forward.register_autograd(_gradients, setup_context=_setup_context)


def run_one_token(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    gate: Tensor,
    norm_weight: Tensor,
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
    """→ y [b, 1, h, v], and keys, values, matrix, position after the token."""
    resets = q.new_zeros(len(q), 1, dtype=torch.bool) if resets is None else resets
    inputs = contiguous(q, k, v, beta, gate, norm_weight, cos, sin, resets, keys, values, matrix, position)
    q, k, v = inputs[:3]
    y, keys, values, matrix, position = (torch.empty_like(x) for x in (v, *inputs[-4:]))
    of = call(q, k, v, slots=keys.shape[1], scale=scale, norm_eps=norm_eps)
    of.each_head(step.step, *inputs, y, keys, values, matrix, position)
    return y, keys, values, matrix, position


one_token = torch.library.custom_op("hqlt::synchronous_step", run_one_token, mutates_args=())


@one_token.register_fake
def _(q, k, v, beta, gate, norm_weight, cos, sin, resets, *others):
    return tuple(x.new_empty(x.shape) for x in (v, *others[:4]))
