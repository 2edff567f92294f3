"""Reads of both memories by a chunk of queries, mixed and normalized, and the backward pass to the queries."""

import triton
import triton.language as tl

from hqlt.ops.synchronous.kernels.attention import attended, query_backward
from hqlt.ops.synchronous.kernels.decay import between, from_start
from hqlt.ops.synchronous.kernels.delta_rule import within_chunk
from hqlt.ops.synchronous.kernels.tiles import (
    chunk_segments,
    finite,
    kernel,
    key_columns,
    load,
    marked,
    matrix,
    nan_where,
    outer,
    product,
    rotated,
    store,
    this_program,
    tile,
    unit_silu,
    unit_silu_backward,
    value_columns,
)


@triton.jit
def both(
    q, k, v, decay, cos, sin, expiry, far, ids, lost, unit_k, R, S, b, n, reader, scale: tl.constexpr, T, L, window,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr,
    M: tl.constexpr, F: tl.constexpr, C: tl.constexpr, ACC: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Returns fw = scale (φQ S + tril(φQ φKᵀ) R), decayed; kv; and the logarithms of the softmax denominators."""
    h, i = reader // G, tl.arange(0, C)
    token = n * C + i
    exists = token < T
    kc, kc_exists = key_columns(K, KP)
    vc, vc_exists = value_columns(V, VP)
    keys = outer(exists, kc_exists)
    own, before, _ = chunk_segments(ids, b, n, T, L, C)
    query = load(tile(q, b, n * C, i, reader, kc, T, H * G, K), keys, ACC)
    query = rotated(query, cos, sin, L - T + token, exists, 1.0, K, KP, ACC).to(DTYPE)
    kv, log_total = attended(
        query, k, v, cos, sin, expiry, far, ids, lost, own, n, b, h, scale, T, L, window, H, K, V, KP, VP, M, F, C, ACC,
        DTYPE,
    )  # fmt: skip
    phi = unit_silu(load(tile(q, b, n * C, i, reader, kc, T, H * G, K), keys, ACC)).to(DTYPE)
    start = load(matrix(S, (b * tl.cdiv(T, C) + n) * H + h, kc, vc, K, V), outer(kc_exists, vc_exists), DTYPE)
    fw = tl.where(
        (own == before)[:, None], scale * from_start(product(phi, start, DTYPE), decay, b, n, h, T, H, C, ACC), 0.0
    )
    key = load(tile(unit_k, b, n * C, i, h, kc, T, H, K), keys, DTYPE)
    r = load(tile(R, b, n * C, i, h, vc, T, H, V), outer(exists, vc_exists), DTYPE)
    attention = between(within_chunk(phi, key, own, C, DTYPE), decay, b, n, h, T, H, C, ACC, 0)
    fw += scale * product(attention, r, DTYPE)
    return fw, kv, log_total


@kernel
def read(
    q, k, v, gate, norm_weight, decay, cos, sin, expiry, far, ids, lost, unit_k, R, S, y, T, L, window,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr,
    M: tl.constexpr, F: tl.constexpr, C: tl.constexpr, ACC: tl.constexpr, scale: tl.constexpr, norm_eps: tl.constexpr,
):  # fmt: skip
    """Computes y = RMSNorm(γ fw + (1 − γ) kv)."""
    n, reader, b = this_program(tl.cdiv(T, C), H * G)
    DTYPE: tl.constexpr = q.dtype.element_ty
    i = tl.arange(0, C)
    token = n * C + i
    vc, vc_exists = value_columns(V, VP)
    values = outer(token < T, vc_exists)
    fw, kv, _ = both(
        q, k, v, decay, cos, sin, expiry, far, ids, lost, unit_k, R, S, b, n, reader, scale, T, L, window, H, G, K, V,
        KP, VP, M, F, C, ACC, DTYPE,
    )  # fmt: skip
    gamma = 1 / (1 + tl.exp(-load(tile(gate, b, n * C, i, reader, vc, T, H * G, V), values, ACC)))
    mix = kv + gamma * (fw - kv)
    mix *= 1 / tl.sqrt(tl.sum(mix * mix, axis=1) / V + norm_eps)[:, None]
    weight = load(norm_weight + vc, vc_exists, ACC)[None, :]
    out = nan_where(lost, (b * T + token) * H + reader // G, token < T, mix * weight)
    store(tile(y, b, n * C, i, reader, vc, T, H * G, V), out, values)


@kernel
def queries_backward(
    q, k, v, gate, norm_weight, decay, cos, sin, expiry, far, ids, lost, unit_k, R, S, dy,
    dq, d_gate, d_weight, d_fw, d_kv, dR, log_total, kv_slope, d_log_read, dead, T, L, window,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr,
    M: tl.constexpr, F: tl.constexpr, C: tl.constexpr, ACC: tl.constexpr, scale: tl.constexpr, norm_eps: tl.constexpr,
):  # fmt: skip
    """Gradients, from dy, of the norm, the gate, both reads and the queries, and of R through the reads in its chunk.

    Also stores what `entries_backward` needs: the logarithms of the softmax denominators, and rowsum(dkv ∘ kv).
    """
    n, reader, b = this_program(tl.cdiv(T, C), H * G)
    h = reader // G
    DTYPE: tl.constexpr = q.dtype.element_ty
    i = tl.arange(0, C)
    token = n * C + i
    exists = token < T
    kc, kc_exists = key_columns(K, KP)
    vc, vc_exists = value_columns(V, VP)
    keys, values, square = outer(exists, kc_exists), outer(exists, vc_exists), outer(kc_exists, vc_exists)
    own, before, _ = chunk_segments(ids, b, n, T, L, C)
    position = L - T + token
    fw, kv, denominator = both(
        q, k, v, decay, cos, sin, expiry, far, ids, lost, unit_k, R, S, b, n, reader, scale, T, L, window, H, G, K, V,
        KP, VP, M, F, C, ACC, DTYPE,
    )  # fmt: skip

    gamma = 1 / (1 + tl.exp(-load(tile(gate, b, n * C, i, reader, vc, T, H * G, V), values, ACC)))
    mix = kv + gamma * (fw - kv)
    unit = 1 / tl.sqrt(tl.sum(mix * mix, axis=1) / V + norm_eps)[:, None]
    d_out = load(tile(dy, b, n * C, i, reader, vc, T, H * G, V), values, ACC)
    to_weight = d_out * mix * unit
    d_mix = d_out * load(norm_weight + vc, vc_exists, ACC)[None, :] * unit
    d_mix -= mix * unit * unit * (tl.sum(d_mix * mix, axis=1) / V)[:, None]
    to_gate = d_mix * (fw - kv) * gamma * (1 - gamma)
    d_from_fw = gamma * d_mix
    d_from_kv = d_mix - d_from_fw
    slope = tl.sum(d_from_kv * kv, axis=1)
    at_token = (b * H * G + reader) * T + token
    if lost is not None:  # a dead row's own gradients are NaN, and it contributes nothing to others
        wrong = tl.sum(d_from_fw - d_from_fw + (d_from_kv - d_from_kv), axis=1)[:, None]  # 0 or NaN
        row = marked(lost, (b * T + token) * H + h, exists)[:, None] | (wrong != wrong)
        tl.store(dead + at_token[:, None], row.to(tl.int8), mask=exists[:, None])
        to_weight, to_gate = tl.where(row, float("nan"), to_weight), tl.where(row, float("nan"), to_gate)
        d_from_fw, d_from_kv = tl.where(row, 0.0, d_from_fw), tl.where(row, 0.0, d_from_kv)
        slope = tl.sum(tl.where(row, 0.0, slope[:, None]), axis=1)  # as columns, fewer registers are spilled
        denominator = tl.sum(tl.where(row, float("inf"), denominator[:, None]), axis=1)
    store(d_weight + ((b * tl.cdiv(T, C) + n) * H * G + reader) * V + vc, tl.sum(to_weight, axis=0), vc_exists)
    store(tile(d_gate, b, n * C, i, reader, vc, T, H * G, V), to_gate, values)
    store(tile(d_fw, b, n * C, i, reader, vc, T, H * G, V), d_from_fw, values)
    store(tile(d_kv, b, n * C, i, reader, vc, T, H * G, V), d_from_kv, values)
    store(log_total + at_token, denominator, exists)
    store(kv_slope + at_token, slope, exists)
    queries = tile(q, b, n * C, i, reader, kc, T, H * G, K)
    rotary_query = rotated(finite(load(queries, keys, ACC), lost), cos, sin, position, exists, 1.0, K, KP, ACC)
    d_query_at = tile(dq, b, n * C, i, reader, kc, T, H * G, K)
    store(d_query_at, rotary_query, keys)
    tl.debug_barrier()  # values stored above are loaded again below, by other threads; in registers they would spill

    d_query = query_backward(
        load(d_query_at, keys, DTYPE),
        load(tile(d_kv, b, n * C, i, reader, vc, T, H * G, V), values, DTYPE), load(log_total + at_token, exists, ACC),
        load(kv_slope + at_token, exists, ACC), k, v, cos, sin, expiry, far, ids, lost, own, n, b, h, scale, T, L,
        window, H, K, V, KP, VP, M, F, C, ACC, DTYPE,
    )  # fmt: skip
    d_query = rotated(d_query, cos, sin, position, exists, -1.0, K, KP, ACC)

    d_read = load(tile(d_fw, b, n * C, i, reader, vc, T, H * G, V), values, DTYPE)
    phi = unit_silu(finite(load(queries, keys, ACC), lost)).to(DTYPE)
    key = load(tile(unit_k, b, n * C, i, h, kc, T, H, K), keys, DTYPE)
    attention = between(within_chunk(phi, key, own, C, DTYPE), decay, b, n, h, T, H, C, ACC, 0)
    store(tile(dR, b, n * C, i, reader, vc, T, H * G, V), scale * product(tl.trans(attention), d_read, DTYPE), values)
    start = load(matrix(S, (b * tl.cdiv(T, C) + n) * H + h, kc, vc, K, V), square, DTYPE)
    r = load(tile(R, b, n * C, i, h, vc, T, H, V), values, DTYPE)
    d_attention = within_chunk(d_read, r, own, C, DTYPE)
    d_phi = scale * product(between(d_attention, decay, b, n, h, T, H, C, ACC, 0), key, DTYPE)
    d_before = from_start(product(d_read, tl.trans(start), DTYPE), decay, b, n, h, T, H, C, ACC)
    d_before = tl.where((own == before)[:, None], scale * d_before, 0.0)
    d_phi += d_before
    if decay is not None:
        within = scale * attention * d_attention
        d_log = tl.sum(within, axis=1) - tl.sum(within, axis=0) + tl.sum(phi.to(ACC) * d_before, axis=1)
        store(d_log_read + at_token, d_log, exists)
    d_query += unit_silu_backward(finite(load(queries, keys, ACC), lost), d_phi)
    d_query = nan_where(dead, at_token, exists, d_query)
    store(d_query_at, d_query, keys)
