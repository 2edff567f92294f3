"""The FW-memory's way back, from its read to what was written."""

import triton.language as tl

from hqlt.ops.synchronous.kernels.delta_rule import within_chunk
from hqlt.ops.synchronous.kernels.tiles import (
    chunk_segments,
    kernel,
    key_columns,
    load,
    matrix,
    pairs,
    product,
    store,
    this_program,
    tile,
    unit_silu,
    unit_silu_backward,
    value_columns,
)


@kernel
def read_backward(
    q, ids, unit_k, R, S, d_fw, dq, d_unit_k, dR, T, L,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, C: tl.constexpr,
    ACC: tl.constexpr, scale: tl.constexpr,
):  # fmt: skip
    """From dfw to φK and R, as read within the chunk, and to q, added to what attention gave it."""
    n, h, b = this_program(tl.cdiv(T, C), H)
    DTYPE: tl.constexpr = q.dtype.element_ty
    i = tl.arange(0, C)
    token = n * C + i
    exists = token < T
    kc, kc_exists = key_columns(K, KP)
    vc, vc_exists = value_columns(V, VP)
    keys, values, square = pairs(exists, kc_exists), pairs(exists, vc_exists), pairs(kc_exists, vc_exists)
    own, before, _ = chunk_segments(ids, b, n, T, L, C)
    sees = (own == before)[:, None]
    at_start = (b * tl.cdiv(T, C) + n) * H + h

    phi = unit_silu(load(tile(q, b, token, h, kc, T, H, K), keys, ACC)).to(DTYPE)
    d_read = (scale * load(tile(d_fw, b, token, h, vc, T, H, V), values, ACC)).to(DTYPE)
    key = load(tile(unit_k, b, token, h, kc, T, H, K), keys, DTYPE)
    attention = within_chunk(phi, key, own, C, DTYPE)
    store(tile(dR, b, token, h, vc, T, H, V), product(tl.trans(attention), d_read, DTYPE), values)
    r = load(tile(R, b, token, h, vc, T, H, V), values, DTYPE)
    d_attention = within_chunk(d_read, r, own, C, DTYPE)
    store(tile(d_unit_k, b, token, h, kc, T, H, K), product(tl.trans(d_attention), phi, DTYPE), keys)
    start = load(matrix(S, at_start, kc, vc, K, V), square, DTYPE)
    d_phi = tl.where(sees, product(d_read, tl.trans(start), DTYPE), 0.0) + product(d_attention, key, DTYPE)
    raw = load(tile(q, b, token, h, kc, T, H, K), keys, ACC)
    dq_at = tile(dq, b, token, h, kc, T, H, K)
    store(dq_at, load(dq_at, keys, ACC) + unit_silu_backward(raw, d_phi), keys)


@kernel
def carry_backward(
    q, unit_k, Y, dR, ids, d_fw, d_final, d_after, d_initial, T, L,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, C: tl.constexpr,
    ACC: tl.constexpr, BLOCK: tl.constexpr, scale: tl.constexpr,
):  # fmt: skip
    """Chunk before chunk: dS', the gradient of the matrix after the chunk, and dR + φK dS' in dR's place.

    dR comes from reading alone; what came later is added here: the matrix before has dS' − Yᵀ dR and what reading gives
    it, scale · φQᵀ dfw. The sum over chunks stays in ACC.
    """
    part, h, b = this_program(tl.cdiv(V, BLOCK), H)
    DTYPE: tl.constexpr = unit_k.dtype.element_ty
    kc, kc_exists = key_columns(K, KP)
    vc = part * BLOCK + tl.arange(0, BLOCK)
    mask = pairs(kc_exists, vc < V)
    chunks = tl.cdiv(T, C)
    after = load(matrix(d_final, b * H + h, kc, vc, K, V), mask, ACC)
    for later in range(chunks):
        n = chunks - 1 - later
        token = n * C + tl.arange(0, C)
        exists = token < T
        own, before, last = chunk_segments(ids, b, n, T, L, C)
        start = (b * chunks + n) * H + h
        store(matrix(d_after, start, kc, vc, K, V), after, mask)
        dR_at = tile(dR, b, token, h, vc, T, H, V)
        key = load(tile(unit_k, b, token, h, kc, T, H, K), pairs(exists & (own == last), kc_exists), DTYPE)
        dr = load(dR_at, pairs(exists, vc < V), ACC) + product(key, after, DTYPE)
        store(dR_at, dr, pairs(exists, vc < V))
        y = load(tile(Y, b, token, h, kc, T, H, K), pairs(exists, kc_exists), DTYPE)
        after = tl.where(before == last, after, 0.0) - product(tl.trans(y), dr, DTYPE)
        phi = unit_silu(load(tile(q, b, token, h, kc, T, H, K), pairs(exists & (own == before), kc_exists), ACC))
        d_read = scale * load(tile(d_fw, b, token, h, vc, T, H, V), pairs(exists, vc < V), ACC)
        after += product(tl.trans(phi), d_read, DTYPE)
    store(matrix(d_initial, b * H + h, kc, vc, K, V), after, mask)


@kernel
def write_backward(
    k, v, beta, ids, unit_k, inverse, R, S, dR, d_after, d_unit_k, dk, dv, d_beta, T, L,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, C: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """From dR and dS' to what was written, added to what attention gave to dk and dv.

    dE = (I + L)⁻ᵀ dR and dL = −tril(dE Rᵀ, −1), where R = (I + L)⁻¹ E and E = β(V − φK S).
    """
    n, h, b = this_program(tl.cdiv(T, C), H)
    DTYPE: tl.constexpr = k.dtype.element_ty
    i = tl.arange(0, C)
    token = n * C + i
    pair = L - T + token
    exists = token < T
    kc, kc_exists = key_columns(K, KP)
    vc, vc_exists = value_columns(V, VP)
    keys, values, square = pairs(exists, kc_exists), pairs(exists, vc_exists), pairs(kc_exists, vc_exists)
    own, before, last = chunk_segments(ids, b, n, T, L, C)
    sees, reaches_end = (own == before)[:, None], (own == last)[:, None]
    at_start = (b * tl.cdiv(T, C) + n) * H + h
    strength = load(beta + (b * T + token) * H + h, exists, ACC)[:, None]

    inverted = load(tile(inverse, b, token, h, i, T, H, C), pairs(exists, i < C), DTYPE)
    dE = product(tl.trans(inverted), load(tile(dR, b, token, h, vc, T, H, V), values, DTYPE), DTYPE)
    dv_at = tile(dv, b, pair, h, vc, L, H, V)
    store(dv_at, load(dv_at, values, ACC) + strength * dE, values)
    key = load(tile(unit_k, b, token, h, kc, T, H, K), keys, DTYPE)
    start = load(matrix(S, at_start, kc, vc, K, V), square, DTYPE)
    error = load(tile(v, b, pair, h, vc, L, H, V), values, ACC)
    error -= tl.where(sees, product(key, start, DTYPE), 0.0)
    r = load(tile(R, b, token, h, vc, T, H, V), values, DTYPE)
    below = (i[:, None] > i[None, :]) & (own[:, None] == own[None, :])
    dL = tl.where(below, -product(dE, tl.trans(r), DTYPE), 0.0)
    d_strength = tl.sum(dE * error, axis=1) + tl.sum(dL * product(key, tl.trans(key), DTYPE), axis=1)
    store(d_beta + (b * T + token) * H + h, d_strength, exists)

    d_key = -tl.where(sees, strength * product(dE, tl.trans(start), DTYPE), 0.0)
    after = load(matrix(d_after, at_start, kc, vc, K, V), square, DTYPE)
    d_key += tl.where(reaches_end, product(r, tl.trans(after), DTYPE), 0.0)
    d_gram = strength * dL
    d_key += product(d_gram + tl.trans(d_gram), key, DTYPE)
    d_key += load(tile(d_unit_k, b, token, h, kc, T, H, K), keys, ACC)
    raw = load(tile(k, b, pair, h, kc, L, H, K), keys, ACC)
    dk_at = tile(dk, b, pair, h, kc, L, H, K)
    store(dk_at, load(dk_at, keys, ACC) + unit_silu_backward(raw, d_key), keys)
