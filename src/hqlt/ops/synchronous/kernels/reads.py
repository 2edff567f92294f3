"""Both memories' reads of a chunk of queries, mixed and normed, and the way back to the two reads."""

import triton
import triton.language as tl

from hqlt.ops.synchronous.kernels.attention import attended
from hqlt.ops.synchronous.kernels.delta_rule import within_chunk
from hqlt.ops.synchronous.kernels.tiles import (
    chunk_segments,
    kernel,
    key_columns,
    load,
    matrix,
    pairs,
    product,
    rotated,
    store,
    this_program,
    tile,
    unit_silu,
    value_columns,
)


@triton.jit
def both(
    q, k, v, cos, sin, ids, unit_k, R, S, b, n, h, scale: tl.constexpr, T, L, window,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, C: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """→ fw = scale (φQ S + tril(φQ φKᵀ) R), kv, and the logarithms of the softmax's denominators."""
    DTYPE: tl.constexpr = q.dtype.element_ty
    token = n * C + tl.arange(0, C)
    exists = token < T
    kc, kc_exists = key_columns(K, KP)
    vc, vc_exists = value_columns(V, VP)
    keys, square = pairs(exists, kc_exists), pairs(kc_exists, vc_exists)
    own, before, _ = chunk_segments(ids, b, n, T, L, C)
    position = L - T + token
    raw = load(tile(q, b, token, h, kc, T, H, K), keys, ACC)
    query = rotated(raw, cos, sin, position, exists, 1.0, K, KP, ACC).to(DTYPE)
    phi = unit_silu(raw).to(DTYPE)
    kv, log_total = attended(
        query, k, v, cos, sin, ids, own, position, b, h, scale, L, window, H, K, V, KP, VP, C, ACC, DTYPE
    )  # fmt: skip
    start = load(matrix(S, (b * tl.cdiv(T, C) + n) * H + h, kc, vc, K, V), square, DTYPE)
    fw = tl.where((own == before)[:, None], product(phi, start, DTYPE), 0.0)
    key = load(tile(unit_k, b, token, h, kc, T, H, K), keys, DTYPE)
    r = load(tile(R, b, token, h, vc, T, H, V), pairs(exists, vc_exists), DTYPE)
    fw += product(within_chunk(phi, key, own, C, DTYPE), r, DTYPE)
    return scale * fw, kv, log_total


@kernel
def read(
    q, k, v, gate, norm_weight, cos, sin, ids, unit_k, R, S, y, T, L, window,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, C: tl.constexpr,
    ACC: tl.constexpr, scale: tl.constexpr, norm_eps: tl.constexpr,
):  # fmt: skip
    """y = RMSNorm(γ fw + (1 − γ) kv)."""
    n, h, b = this_program(tl.cdiv(T, C), H)
    fw, kv, _ = both(
        q, k, v, cos, sin, ids, unit_k, R, S, b, n, h, scale, T, L, window, H, K, V, KP, VP, C, ACC
    )  # fmt: skip
    token = n * C + tl.arange(0, C)
    vc, vc_exists = value_columns(V, VP)
    values = pairs(token < T, vc_exists)
    gamma = 1 / (1 + tl.exp(-load(tile(gate, b, token, h, vc, T, H, V), values, ACC)))
    mix = kv + gamma * (fw - kv)
    mix *= 1 / tl.sqrt(tl.sum(mix * mix, axis=1) / V + norm_eps)[:, None]
    weight = load(norm_weight + vc, vc_exists, ACC)[None, :]
    store(tile(y, b, token, h, vc, T, H, V), mix * weight, values)


@kernel
def mix_backward(
    q, k, v, gate, norm_weight, cos, sin, ids, unit_k, R, S, dy,
    d_gate, d_weight, d_fw, d_kv, log_total, kv_slope, T, L, window,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, C: tl.constexpr,
    ACC: tl.constexpr, scale: tl.constexpr, norm_eps: tl.constexpr,
):  # fmt: skip
    """From dy to the norm, the gate and the two reads.

    For attention's way back also the logarithms of its denominators, and its slope rowsum(dkv ∘ kv).
    """
    n, h, b = this_program(tl.cdiv(T, C), H)
    fw, kv, denominator = both(
        q, k, v, cos, sin, ids, unit_k, R, S, b, n, h, scale, T, L, window, H, K, V, KP, VP, C, ACC
    )  # fmt: skip
    token = n * C + tl.arange(0, C)
    exists = token < T
    vc, vc_exists = value_columns(V, VP)
    values = pairs(exists, vc_exists)
    gamma = 1 / (1 + tl.exp(-load(tile(gate, b, token, h, vc, T, H, V), values, ACC)))
    mix = kv + gamma * (fw - kv)
    unit = 1 / tl.sqrt(tl.sum(mix * mix, axis=1) / V + norm_eps)[:, None]
    d_out = load(tile(dy, b, token, h, vc, T, H, V), values, ACC)
    store(d_weight + ((b * tl.cdiv(T, C) + n) * H + h) * V + vc, tl.sum(d_out * mix * unit, axis=0), vc_exists)
    d_mix = d_out * load(norm_weight + vc, vc_exists, ACC)[None, :] * unit
    d_mix -= mix * unit * unit * (tl.sum(d_mix * mix, axis=1) / V)[:, None]
    store(tile(d_gate, b, token, h, vc, T, H, V), d_mix * (fw - kv) * gamma * (1 - gamma), values)
    store(tile(d_fw, b, token, h, vc, T, H, V), gamma * d_mix, values)
    d_mix -= gamma * d_mix
    store(tile(d_kv, b, token, h, vc, T, H, V), d_mix, values)
    store(log_total + (b * H + h) * T + token, denominator, exists)
    store(kv_slope + (b * H + h) * T + token, tl.sum(d_mix * kv, axis=1), exists)
