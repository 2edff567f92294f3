"""The backward pass through the matrix, and to the keys and values of both memories."""

import triton.language as tl

from hqlt.ops.synchronous.kernels.attention import entry_backward
from hqlt.ops.synchronous.kernels.decay import between, from_start, throughout, to_end
from hqlt.ops.synchronous.kernels.tiles import (
    chunk_segments,
    finite,
    kernel,
    key_columns,
    load,
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


@kernel
def carry_backward(
    q, unit_k, Y, dR, decay, ids, lost, d_fw, d_final, d_after, d_initial, T, L,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, C: tl.constexpr,
    ACC: tl.constexpr, BLOCK: tl.constexpr, scale: tl.constexpr,
):  # fmt: skip
    """Loops over chunks in reverse: stores dS', the gradient of the matrix after each chunk, and adds φK dS' to dR.

    On entry, dR holds the gradient through reads, for each of G query heads. On exit, the place of the first head of a
    group holds the sum over heads plus φK dS'. The gradient of the matrix before the chunk is dS' − Yᵀ dR plus that
    through its reads, scale · φQᵀ dfw. The sum over chunks is kept in ACC.
    """
    part, h, b = this_program(tl.cdiv(V, BLOCK), H)
    DTYPE: tl.constexpr = unit_k.dtype.element_ty
    kc, kc_exists = key_columns(K, KP)
    i, vc = tl.arange(0, C), part * BLOCK + tl.arange(0, BLOCK)
    mask = outer(kc_exists, vc < V)
    chunks = tl.cdiv(T, C)
    after = load(matrix(d_final, b * H + h, kc, vc, K, V), mask, ACC)
    for later in range(chunks):
        n = chunks - 1 - later
        token = n * C + i
        exists = token < T
        own, before, last = chunk_segments(ids, b, n, T, L, C)
        store(matrix(d_after, (b * chunks + n) * H + h, kc, vc, K, V), after, mask)
        key = load(tile(unit_k, b, n * C, i, h, kc, T, H, K), outer(exists & (own == last), kc_exists), DTYPE)
        dr = to_end(product(key, after, DTYPE), decay, b, n, h, T, H, C, ACC)
        for g in range(G):
            dr += load(tile(dR, b, n * C, i, h * G + g, vc, T, H * G, V), outer(exists, vc < V), ACC)
        store(tile(dR, b, n * C, i, h * G, vc, T, H * G, V), dr, outer(exists, vc < V))
        y = load(tile(Y, b, n * C, i, h, kc, T, H, K), outer(exists, kc_exists), DTYPE)
        after = tl.where(before == last, throughout(after, decay, b, n, h, T, H, C, ACC), 0.0) - product(
            tl.trans(y), dr, DTYPE
        )
        for g in range(G):
            sees = outer(exists & (own == before), kc_exists)
            phi = unit_silu(finite(load(tile(q, b, n * C, i, h * G + g, kc, T, H * G, K), sees, ACC), lost))
            d_read = load(tile(d_fw, b, n * C, i, h * G + g, vc, T, H * G, V), outer(exists, vc < V), ACC)
            after += product(tl.trans(phi), from_start(scale * d_read, decay, b, n, h, T, H, C, ACC), DTYPE)
    store(matrix(d_initial, b * H + h, kc, vc, K, V), after, mask)


@kernel
def entries_backward(
    q, k, v, beta, decay, cos, sin, expiry, ids, reached, unit_k, inverse, R, S, d_kv, d_fw, log_total, kv_slope,
    d_log_read, dR, d_after, dk, dv, d_beta, d_decay, T, L, window,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr,
    C: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr, scale: tl.constexpr,
):  # fmt: skip
    """Gradients of C entries through their write (dR, dS'), the reads within their chunk (dfw), and attention (dkv).

    dE = (I + L)⁻ᵀ dR and dL = −tril(dE Rᵀ, −1), where R = (I + L)⁻¹ E and E = β(V − φK S). Entries held from earlier
    were already written, so they have a gradient through attention only.
    """
    held = L - T
    program, h, b = this_program(tl.cdiv(held, C) + tl.cdiv(T, C), H)
    n = program - tl.cdiv(held, C)  # index among the chunks of new tokens; negative for held entries
    DTYPE: tl.constexpr = k.dtype.element_ty
    i = tl.arange(0, C)
    token = n * C + i
    entry = held + token
    new, exists = (token >= 0) & (token < T), (entry >= 0) & (entry < L)
    kc, kc_exists = key_columns(K, KP)
    vc, vc_exists = value_columns(V, VP)
    keys, values = outer(exists, kc_exists), outer(exists, vc_exists)
    square = outer(kc_exists & (kc < tl.where(n >= 0, K, 0)), vc_exists)  # held entries have no matrix
    own, before, last = chunk_segments(ids, b, n, T, L, C)
    sees, reaches_end = (own == before)[:, None], (own == last)[:, None]
    same = own[:, None] == own[None, :]
    at_start = (b * tl.cdiv(T, C) + n) * H + h
    segment = tl.where(exists, own, -1)

    if decay is not None:
        carried = load(matrix(S, at_start, kc, vc, K, V), square, ACC)
        carried *= load(matrix(d_after, at_start, kc, vc, K, V), square, ACC)
        carried = throughout(tl.sum(tl.sum(carried, axis=1), axis=0), decay, b, n, h, T, H, C, ACC)
        carried = tl.where(before == last, carried, 0.0)

    key_at, value_at = tile(k, b, held + n * C, i, h, kc, L, H, K), tile(v, b, held + n * C, i, h, vc, L, H, V)
    d_key_at = tile(dk, b, held + n * C, i, h, kc, L, H, K)
    rotary_key = rotated(finite(load(key_at, keys, ACC), reached), cos, sin, entry, exists, 1.0, K, KP, ACC)
    store(d_key_at, rotary_key, keys)
    tl.debug_barrier()  # loaded, the keys are factors from shared memory; in registers they would spill in every loop
    d_key, d_value = entry_backward(
        load(d_key_at, keys, DTYPE),
        finite(load(value_at, values, DTYPE), reached), held + n * C, segment, q, cos, sin, expiry, ids, reached, d_kv,
        log_total, kv_slope, b, h, scale, T, L, window, H, G, K, V, KP, VP, C, ACC, DTYPE, BLOCK,
    )  # fmt: skip
    d_key = rotated(d_key, cos, sin, entry, exists, -1.0, K, KP, ACC)

    strength = load(beta + (b * T + token) * H + h, new, ACC)[:, None]
    inverted = load(tile(inverse, b, n * C, i, h, i, T, H, C), outer(new, i < C), DTYPE)
    d_correction = load(tile(dR, b, n * C, i, h * G, vc, T, H * G, V), outer(new, vc_exists), DTYPE)
    dE = product(tl.trans(inverted), d_correction, DTYPE)
    at_entry = (b * L + entry) * H + h
    d_value = nan_where(reached, at_entry, exists, d_value + strength * dE)
    store(tile(dv, b, held + n * C, i, h, vc, L, H, V), d_value, values)
    key = load(tile(unit_k, b, n * C, i, h, kc, T, H, K), outer(new, kc_exists), DTYPE)
    start = load(matrix(S, at_start, kc, vc, K, V), square, DTYPE)
    error = finite(load(value_at, outer(new, vc_exists), ACC), reached)
    predicted = tl.where(sees, from_start(product(key, start, DTYPE), decay, b, n, h, T, H, C, ACC), 0.0)
    d_log = -tl.sum(strength * dE * predicted, axis=1)
    error -= predicted
    r = load(tile(R, b, n * C, i, h, vc, T, H, V), outer(new, vc_exists), DTYPE)
    dL = tl.where((i[:, None] > i[None, :]) & same, -product(dE, tl.trans(r), DTYPE), 0.0)
    dL = between(dL, decay, b, n, h, T, H, C, ACC, 0)
    from_L = dL * product(key, tl.trans(key), DTYPE)
    d_strength = tl.sum(dE * error, axis=1) + tl.sum(from_L, axis=1)
    d_log += tl.sum(strength * from_L, axis=1) - tl.sum(strength * from_L, axis=0)
    store(d_beta + (b * T + token) * H + h, nan_where(reached, at_entry, exists, d_strength), new)

    d_phi = -tl.where(
        sees, strength * from_start(product(dE, tl.trans(start), DTYPE), decay, b, n, h, T, H, C, ACC), 0.0
    )
    after = load(matrix(d_after, at_start, kc, vc, K, V), square, DTYPE)
    d_written = tl.where(reaches_end, to_end(product(r, tl.trans(after), DTYPE), decay, b, n, h, T, H, C, ACC), 0.0)
    d_phi += d_written
    if decay is not None:
        to_the_end = tl.sum(d_written * key.to(ACC), axis=1)
        for g in range(G):
            d_log += load(d_log_read + (b * H * G + h * G + g) * T + token, new, ACC)
        d_log = tl.cumsum(d_log - to_the_end, axis=0, reverse=True) + tl.sum(to_the_end, axis=0) + carried
        store(d_decay + (b * T + token) * H + h, nan_where(reached, at_entry, exists, d_log), new)
    d_gram = strength * dL
    d_phi += product(d_gram + tl.trans(d_gram), key, DTYPE)
    for g in range(G):
        phi = finite(load(tile(q, b, n * C, i, h * G + g, kc, T, H * G, K), outer(new, kc_exists), ACC), reached)
        phi = unit_silu(phi)
        d_read = load(tile(d_fw, b, n * C, i, h * G + g, vc, T, H * G, V), outer(new, vc_exists), DTYPE)
        d_attention = tl.where((i[:, None] <= i[None, :]) & same, scale * product(r, tl.trans(d_read), DTYPE), 0.0)
        d_phi += product(between(d_attention, decay, b, n, h, T, H, C, ACC, 1), phi, DTYPE)
    d_key += unit_silu_backward(finite(load(key_at, keys, ACC), reached), d_phi)
    d_key = nan_where(reached, at_entry, exists, d_key)
    store(d_key_at, d_key, keys)
