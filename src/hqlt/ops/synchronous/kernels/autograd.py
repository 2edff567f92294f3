"""The passes in their order: three forward, and eight backward of which two are forward's.

    forward    prepare          k, v, β → φ(k), (I + L)⁻¹, Y, U       each chunk by itself
               carry            φ(k), Y, U → R, S                     chunk after chunk
               read             q, k, v, φ(k), R, S, gate → y         fw, kv, mixer and norm, each chunk by itself
    backward   prepare and carry again, then
               mix_backward     q, k, v, φ(k), R, S, gate, dy → dfw, dkv, dgate, dnorm
               query_backward   q, k, v, dkv → dq                     attention
               key_backward     q, k, v, dkv → dk, dv
               read_backward    q, φ(k), R, S, dfw → dφ(k), dR, dS, and more dq
               carry_backward   φ(k), Y, dR, dS → dS', and more dR    chunk before chunk
               write_backward   k, v, φ(k), R, S, dφ(k), dR, dS' → dβ, and more dk, dv

Nothing but the inputs is kept for the backward pass. Sums are in at least float32; the factors of matrix products, and
what goes from one pass to the next, have the inputs' type.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from hqlt.ops.segments import segment_ids
from hqlt.ops.synchronous.kernels import attention, delta_rule, delta_rule_backward, reads
from hqlt.shapes import at_least_float32


class _Sizes(NamedTuple):
    """Of one call: grids, and the kernels' sizes by name."""

    b: int
    n: int
    h: int
    named: dict[str, Any]

    @property
    def each_chunk(self) -> tuple[int, int, int]:
        """A program for each chunk, head and row."""
        return self.n, self.h, self.b

    @property
    def each_block_of_pairs(self) -> tuple[int, int, int]:
        """The same over the key timeline."""
        return -(-self.named["L"] // self.named["C"]), self.h, self.b

    @property
    def each_slice(self) -> tuple[int, int, int]:
        """A program for each 32 columns of a matrix: it goes through all chunks."""
        return -(-self.named["V"] // self.slices["VP"]), self.h, self.b

    @property
    def slices(self) -> dict[str, Any]:
        return self.named | {"VP": min(self.named["VP"], 32), "num_warps": 4, "num_stages": 2}


def sizes(q: Tensor, k: Tensor, v: Tensor) -> _Sizes:
    b, t, h, width = q.shape
    c = 64 if q.element_size() == 2 else 32
    named = {
        "T": t, "L": k.shape[1], "H": h, "K": width, "V": v.shape[3], "C": c,
        "KP": 2 * _power_of_two((width + 1) // 2, 8), "VP": _power_of_two(v.shape[3], 16),
        "ACC": tl.float64 if q.dtype == torch.float64 else tl.float32,
        "num_warps": 8 if max(width, v.shape[3]) > 64 else 4, "num_stages": 1,
    }  # fmt: skip
    return _Sizes(b, -(-t // c), h, named)


def _power_of_two(width: int, least: int) -> int:
    return max(1 << (width - 1).bit_length(), least)


class _Written(NamedTuple):
    """What the FW-memory's passes leave for the read."""

    unit_k: Tensor  # φ(k) [b, t, h, k]
    inverse: Tensor  # (I + L)⁻¹ [b, t, h, c]
    Y: Tensor  # [b, t, h, k]
    R: Tensor  # corrections [b, t, h, v]
    S: Tensor  # the matrix at each chunk's start [b, n, h, k, v]
    final: Tensor  # [b, h, k, v]


def _write(size: _Sizes, k: Tensor, v: Tensor, beta: Tensor, state: Tensor, ids: Tensor) -> _Written:
    b, n, h, named = size
    t, width, c = named["T"], named["K"], named["C"]
    unit_k, Y = k.new_empty(2, b, t, h, width)
    inverse, R = k.new_empty(b, t, h, c), v.new_empty(b, t, h, v.shape[3])
    S, final = v.new_empty(b, n, *state.shape[1:]), torch.empty_like(state)
    precision = "tf32" if k.element_size() == 2 else "ieee"  # finer than the factors it is made of
    delta_rule.prepare[size.each_chunk](k, v, beta, ids, unit_k, inverse, Y, R, **named, PRECISION=precision)
    delta_rule.carry[size.each_slice](unit_k, Y, R, ids, state, S, final, **size.slices)
    return _Written(unit_k, inverse, Y, R, S, final)


class Synchronous(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
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
        q, k, v, beta, gate, norm_weight, state = (x.contiguous() for x in (q, k, v, beta, gate, norm_weight, state))
        cos, sin = (x if x is None else x.contiguous() for x in (cos, sin))
        ids = k.new_zeros(k.shape[:2], dtype=torch.int32) if resets is None else segment_ids(resets).int()
        ctx.save_for_backward(q, k, v, beta, gate, norm_weight, state, cos, sin, ids)
        ctx.window, ctx.scale, ctx.norm_eps = window, scale, norm_eps
        size = sizes(q, k, v)
        y = torch.empty_like(gate)
        with torch.cuda.device_of(q):
            written = _write(size, k, v, beta, state, ids)
            reads.read[size.each_chunk](
                q, k, v, gate, norm_weight, cos, sin, ids, written.unit_k, written.R, written.S, y,
                scale, norm_eps, window=window, **size.named,
            )  # fmt: skip
        return y, written.final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, d_final: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, beta, gate, norm_weight, state, cos, sin, ids = ctx.saved_tensors
        size = sizes(q, k, v)
        b, n, h, named = size
        t, wide = q.shape[1], at_least_float32(q.dtype)
        dq, dk, dv, d_gate, d_fw, d_kv = (torch.empty_like(x) for x in (q, k, v, gate, gate, gate))
        d_weight = v.new_empty(b, n, h, v.shape[3], dtype=wide)
        log_total, kv_slope = v.new_empty(2, b, h, t, dtype=wide)
        d_beta, d_state = torch.empty_like(beta), torch.empty_like(state)
        with torch.cuda.device_of(q):
            unit_k, inverse, Y, R, S, _ = _write(size, k, v, beta, state, ids)
            d_unit_k, dR, dS, d_after = (torch.empty_like(x) for x in (unit_k, R, S, S))
            reads.mix_backward[size.each_chunk](
                q, k, v, gate, norm_weight, cos, sin, ids, unit_k, R, S, dy.contiguous(),
                d_gate, d_weight, d_fw, d_kv, log_total, kv_slope,
                ctx.scale, ctx.norm_eps, window=ctx.window, **named,
            )  # fmt: skip
            attended = q, k, v, cos, sin, ids, d_kv, log_total, kv_slope
            attention.query_backward[size.each_chunk](*attended, dq, ctx.scale, window=ctx.window, **named)
            attention.key_backward[size.each_block_of_pairs](*attended, dk, dv, ctx.scale, window=ctx.window, **named)
            delta_rule_backward.read_backward[size.each_chunk](
                q, ids, unit_k, R, S, d_fw, dq, d_unit_k, dR, dS, ctx.scale, **named
            )
            delta_rule_backward.carry_backward[size.each_slice](
                unit_k, Y, dR, ids, d_final.contiguous(), dS, d_after, d_state, **size.slices
            )
            delta_rule_backward.write_backward[size.each_chunk](
                k, v, beta, ids, unit_k, inverse, R, S, dR, d_after, d_unit_k, dk, dv, d_beta, **named
            )
        d_weight = d_weight.sum(dim=(0, 1, 2)).to(norm_weight.dtype)
        return dq, dk, dv, d_beta, d_gate, d_weight, d_state, *(None,) * 6
