"""The KV-memory: attention over the window and over kept entries with an online softmax, and its backward pass."""

import triton
import triton.language as tl

from hqlt.ops.synchronous.kernels.tiles import (
    finite,
    kernel,
    key_columns,
    load,
    outer,
    product,
    rotated,
    this_program,
    tile,
    value_columns,
)


@triton.jit
def visible(position, own, j, key_segment, expiry, b, h, L, window, H: tl.constexpr):
    """Mask of the entries j that the tokens at `position` see: those within the window, and those not yet expired."""
    age = position[:, None] - j[None, :]
    reach = (age < window) & (own[:, None] == key_segment[None, :])
    if expiry is not None:
        reach |= position[:, None] < tl.load(expiry + (b * L + j) * H + h, mask=(j >= 0) & (j < L), other=0)[None, :]
    return reach & (age >= 0) & (j < L)[None, :]


@triton.jit
def far_entries(far, b, n, h, at, T, H: tl.constexpr, M: tl.constexpr, F: tl.constexpr, C: tl.constexpr):
    """F of the at most M entries beyond the window that chunk n may read (see `list_far`), and which of them exist."""
    slot = at + tl.arange(0, F)
    j = tl.load(far + ((b * tl.cdiv(T, C) + n) * H + h) * M + slot, mask=slot < M, other=-1).to(tl.int64)
    return j, j >= 0


@kernel
def list_far(
    expiry, far, T, L, window,
    H: tl.constexpr, M: tl.constexpr, F: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Lists, for each chunk of queries, the entries that left the window before the chunk's first token and have not
    expired by then: far [b, chunks, H, M], −1 after the last. A chunk's list is made of the previous chunk's and of the
    entries that have left the window since."""
    _, h, b = this_program(1, H)
    chunks = tl.cdiv(T, C)
    i, slot = tl.arange(0, C), tl.arange(0, F)
    left = 0
    for n in range(chunks):
        first = L - T + n * C
        to = far + ((b * chunks + n) * H + h) * M
        count = 0
        for at in range(0, M, F):
            j = tl.load(to - H * M + at + slot, mask=(n > 0) & (at + slot < M), other=-1)
            stays = (j >= 0) & (tl.load(expiry + (b * L + j) * H + h, mask=j >= 0, other=0) > first)
            tl.store(to + count + tl.cumsum(stays.to(tl.int32), axis=0) - 1, j, mask=stays)
            count += tl.sum(stays.to(tl.int32), axis=0)
        gone = tl.maximum(first - window + 1, 0)
        for at in range(left, gone, C):
            j = at + i
            stays = (j < gone) & (tl.load(expiry + (b * L + j) * H + h, mask=j < gone, other=0) > first)
            place = count + tl.cumsum(stays.to(tl.int32), axis=0) - 1
            tl.store(to + place, j, mask=stays & (place < M))
            count += tl.sum(stays.to(tl.int32), axis=0)
        for at in range(0, M, F):
            tl.store(to + at + slot, -1, mask=(at + slot >= count) & (at + slot < M))
        left = gone
        tl.debug_barrier()  # the next chunk loads what other threads store here


@triton.jit
def softmax_update(
    top, total, read, query, k, v, cos, sin, expiry, ids, lost, own, position, begin, j, exists, b, h,
    scale: tl.constexpr, L, window, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr,
    VP: tl.constexpr, ACC: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The online softmax of queries at `position`, updated by the entries at begin + j."""
    kc, kc_exists = key_columns(K, KP)
    vc, vc_exists = value_columns(V, VP)
    key = finite(load(tile(k, b, begin, j, h, kc, L, H, K), outer(exists, kc_exists), ACC), lost)
    key = rotated(key, cos, sin, begin + j, exists, 1.0, K, KP, ACC)
    segment = tl.load(ids + b * L + begin + j, mask=exists, other=-1)
    reach = visible(position, own, tl.where(exists, begin + j, L), segment, expiry, b, h, L, window, H)
    score = tl.where(reach, scale * product(query, tl.trans(key), DTYPE), float("-inf"))
    higher = tl.maximum(top, tl.max(score, axis=1))
    level = tl.where(higher == float("-inf"), 0.0, higher)
    weight = tl.exp(score - level[:, None])
    shrink = tl.exp(top - level)
    value = finite(load(tile(v, b, begin, j, h, vc, L, H, V), outer(exists, vc_exists), DTYPE), lost)
    return higher, total * shrink + tl.sum(weight, axis=1), read * shrink[:, None] + product(weight, value, DTYPE)


@triton.jit
def attended(
    query, k, v, cos, sin, expiry, far, ids, lost, own, n, b, h, scale: tl.constexpr, T, L, window,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, M: tl.constexpr,
    F: tl.constexpr, C: tl.constexpr, ACC: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The KV read [C, VP] of the queries of chunk n (with rotary embedding), and the logarithms of the softmax
    denominators [C]."""
    top = tl.full((C,), float("-inf"), ACC)
    total = tl.zeros((C,), ACC)
    read = tl.zeros((C, VP), ACC)
    i = tl.arange(0, C)
    first = L - T + n * C
    if far is not None:
        for at in range(0, M, F):
            j, exists = far_entries(far, b, n, h, at, T, H, M, F, C)
            top, total, read = softmax_update(
                top, total, read, query, k, v, cos, sin, expiry, ids, lost, own, first + i, 0, j, exists, b, h, scale,
                L, window, H, K, V, KP, VP, ACC, DTYPE,
            )  # fmt: skip
    for begin in range(tl.maximum(first - window + 1, 0), tl.minimum(first + C, L), C):
        top, total, read = softmax_update(
            top, total, read, query, k, v, cos, sin, expiry, ids, lost, own, first + i, begin, i, begin + i < L, b, h,
            scale, L, window, H, K, V, KP, VP, ACC, DTYPE,
        )  # fmt: skip
    total = tl.where(total > 0, total, 1.0)
    return read / total[:, None], tl.where(top == float("-inf"), 0.0, top) + tl.log(total)


@triton.jit
def query_gradient(
    query, d_read, denominator, slope, k, v, cos, sin, expiry, ids, lost, own, position, begin, j, exists, b, h,
    scale: tl.constexpr, L, window, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr,
    VP: tl.constexpr, ACC: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Gradient of queries at `position` through the entries at begin + j: dA k."""
    kc, kc_exists = key_columns(K, KP)
    vc, vc_exists = value_columns(V, VP)
    key = finite(load(tile(k, b, begin, j, h, kc, L, H, K), outer(exists, kc_exists), ACC), lost)
    key = rotated(key, cos, sin, begin + j, exists, 1.0, K, KP, ACC).to(DTYPE)
    segment = tl.load(ids + b * L + begin + j, mask=exists, other=-1)
    score = scale * product(query, tl.trans(key), DTYPE) - denominator[:, None]
    reach = visible(position, own, tl.where(exists, begin + j, L), segment, expiry, b, h, L, window, H)
    weight = tl.exp(tl.where(reach, score, float("-inf")))
    value = finite(load(tile(v, b, begin, j, h, vc, L, H, V), outer(exists, vc_exists), DTYPE), lost)
    d_score = scale * weight * (product(d_read, tl.trans(value), DTYPE) - slope[:, None])
    return product(d_score, key, DTYPE)


@triton.jit
def query_backward(
    query, d_read, denominator, slope, k, v, cos, sin, expiry, far, ids, lost, own, n, b, h, scale: tl.constexpr, T, L,
    window, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, M: tl.constexpr,
    F: tl.constexpr, C: tl.constexpr, ACC: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Gradient of the queries of chunk n (with rotary embedding) through attention: dA k over the entries that they
    see, where dA = scale · P ∘ (dkv vᵀ − slope), slope = rowsum(dkv ∘ kv) and P = exp(scale · q kᵀ − denominator)."""
    i = tl.arange(0, C)
    first = L - T + n * C
    d_query = tl.zeros((C, KP), ACC)
    if far is not None:
        for at in range(0, M, F):
            j, exists = far_entries(far, b, n, h, at, T, H, M, F, C)
            d_query += query_gradient(
                query, d_read, denominator, slope, k, v, cos, sin, expiry, ids, lost, own, first + i, 0, j, exists, b,
                h, scale, L, window, H, K, V, KP, VP, ACC, DTYPE,
            )  # fmt: skip
    for begin in range(tl.maximum(first - window + 1, 0), tl.minimum(first + C, L), C):
        d_query += query_gradient(
            query, d_read, denominator, slope, k, v, cos, sin, expiry, ids, lost, own, first + i, begin, i,
            begin + i < L, b, h, scale, L, window, H, K, V, KP, VP, ACC, DTYPE,
        )  # fmt: skip
    return d_query


@triton.jit
def entry_backward(
    key, value, first, segment, q, cos, sin, expiry, ids, reached, d_kv, log_total, kv_slope, b, h, scale: tl.constexpr,
    T, L, window, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr,
    VP: tl.constexpr, C: tl.constexpr, ACC: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of keys (with rotary embedding) and values through attention, from position `first` on: dk = dAᵀ q and
    dv = Pᵀ dkv, over the queries of G heads that see them. Pᵀ is computed directly."""
    kc, kc_exists = key_columns(K, KP)
    vc, vc_exists = value_columns(V, VP)
    held = L - T
    j, i = first + tl.arange(0, C), tl.arange(0, BLOCK)
    d_key, d_value = tl.zeros((C, KP), ACC), tl.zeros((C, VP), ACC)
    end = first - held + C - 1 + window
    if expiry is not None:
        last = tl.load(expiry + (b * L + j) * H + h, mask=(j >= 0) & (j < L), other=0)
        end = tl.maximum(end, tl.max(last, axis=0) - held)
    for g in range(G):
        reader = h * G + g
        for begin in range(tl.maximum(first - held, 0), tl.minimum(end, T), BLOCK):
            token = begin + i
            exists = token < T
            position = held + token
            query = finite(load(tile(q, b, begin, i, reader, kc, T, H * G, K), outer(exists, kc_exists), ACC), reached)
            query = rotated(query, cos, sin, position, exists, 1.0, K, KP, ACC).to(DTYPE)
            own = tl.load(ids + b * L + position, mask=exists, other=-2)
            at = (b * H * G + reader) * T + token
            score = scale * product(key, tl.trans(query), DTYPE) - load(log_total + at, exists, ACC)[None, :]
            reach = tl.trans(visible(position, own, j, segment, expiry, b, h, L, window, H))
            weight = tl.exp(tl.where(reach, score, float("-inf")))
            d_read = load(tile(d_kv, b, begin, i, reader, vc, T, H * G, V), outer(exists, vc_exists), DTYPE)
            d_value += product(weight, d_read, DTYPE)
            slope = load(kv_slope + at, exists, ACC)[None, :]
            d_score = scale * weight * (product(value, tl.trans(d_read), DTYPE) - slope)
            d_key += product(d_score, query, DTYPE)
    return d_key, d_value
