"""The KV-memory: softmax attention over the window by an online softmax, and its way back to queries and to pairs."""

import triton
import triton.language as tl

from hqlt.ops.synchronous.kernels.tiles import (
    chunk_segments,
    kernel,
    key_columns,
    load,
    pairs,
    product,
    rotated,
    store,
    this_program,
    tile,
    value_columns,
)


@triton.jit
def visible(position, own, j, key_segment, L, window):
    """Which of the pairs at j the tokens at `position` read."""
    age = position[:, None] - j[None, :]
    return (age >= 0) & (age < window) & (j < L)[None, :] & (own[:, None] == key_segment[None, :])


@triton.jit
def attended(
    query, k, v, cos, sin, ids, own, position, b, h, scale: tl.constexpr, L, window,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, C: tl.constexpr,
    ACC: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """→ KV read [C, VP] of rotated queries by an online softmax, and the logarithm of its denominators [C]."""
    kc, kc_exists = key_columns(K, KP)
    vc, vc_exists = value_columns(V, VP)
    top = tl.full((C,), float("-inf"), ACC)
    total = tl.zeros((C,), ACC)
    read = tl.zeros((C, VP), ACC)
    first = tl.min(position, axis=0)
    for begin in range(tl.maximum(first - window + 1, 0), tl.minimum(first + C, L), C):
        j = begin + tl.arange(0, C)
        exists = j < L
        key = load(tile(k, b, j, h, kc, L, H, K), pairs(exists, kc_exists), ACC)
        key = rotated(key, cos, sin, j, exists, 1.0, K, KP, ACC)
        segment = tl.load(ids + b * L + j, mask=exists, other=-1)
        reach = visible(position, own, j, segment, L, window)
        score = tl.where(reach, scale * product(query, tl.trans(key), DTYPE), float("-inf"))
        higher = tl.maximum(top, tl.max(score, axis=1))
        level = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp(score - level[:, None])
        shrink = tl.exp(top - level)
        total = total * shrink + tl.sum(weight, axis=1)
        value = load(tile(v, b, j, h, vc, L, H, V), pairs(exists, vc_exists), DTYPE)
        read = read * shrink[:, None] + product(weight, value, DTYPE)
        top = higher
    total = tl.where(total > 0, total, 1.0)
    return read / total[:, None], tl.where(top == float("-inf"), 0.0, top) + tl.log(total)


@kernel
def query_backward(
    q, k, v, cos, sin, ids, d_kv, log_total, kv_slope, dq, T, L, window,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, C: tl.constexpr,
    ACC: tl.constexpr, scale: tl.constexpr,
):  # fmt: skip
    """What attention gives to C queries, from all pairs that they reach: dq = dA k, dA = scale · P ∘ (dP − slope)."""
    n, h, b = this_program(tl.cdiv(T, C), H)
    DTYPE: tl.constexpr = q.dtype.element_ty
    token = n * C + tl.arange(0, C)
    exists = token < T
    kc, kc_exists = key_columns(K, KP)
    vc, vc_exists = value_columns(V, VP)
    keys, values = pairs(exists, kc_exists), pairs(exists, vc_exists)
    own, _, _ = chunk_segments(ids, b, n, T, L, C)
    position = L - T + token
    query = load(tile(q, b, token, h, kc, T, H, K), keys, ACC)
    query = rotated(query, cos, sin, position, exists, 1.0, K, KP, ACC).to(DTYPE)
    d_read = load(tile(d_kv, b, token, h, vc, T, H, V), values, DTYPE)
    denominator = load(log_total + (b * H + h) * T + token, exists, ACC)[:, None]
    slope = load(kv_slope + (b * H + h) * T + token, exists, ACC)[:, None]
    d_query = tl.zeros((C, KP), ACC)
    first = L - T + n * C
    for begin in range(tl.maximum(first - window + 1, 0), tl.minimum(first + C, L), C):
        j = begin + tl.arange(0, C)
        there = j < L
        key = load(tile(k, b, j, h, kc, L, H, K), pairs(there, kc_exists), ACC)
        key = rotated(key, cos, sin, j, there, 1.0, K, KP, ACC).to(DTYPE)
        segment = tl.load(ids + b * L + j, mask=there, other=-1)
        score = scale * product(query, tl.trans(key), DTYPE) - denominator
        weight = tl.exp(tl.where(visible(position, own, j, segment, L, window), score, float("-inf")))
        value = load(tile(v, b, j, h, vc, L, H, V), pairs(there, vc_exists), DTYPE)
        d_score = scale * weight * (product(d_read, tl.trans(value), DTYPE) - slope)
        d_query += product(d_score, key, DTYPE)
    d_query = rotated(d_query, cos, sin, position, exists, -1.0, K, KP, ACC)
    store(tile(dq, b, token, h, kc, T, H, K), d_query, keys)


@kernel
def key_backward(
    q, k, v, cos, sin, ids, d_kv, log_total, kv_slope, dk, dv, T, L, window,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, C: tl.constexpr,
    ACC: tl.constexpr, BLOCK: tl.constexpr, scale: tl.constexpr,
):  # fmt: skip
    """What attention gives to C pairs, from all queries that reach them: dv = Pᵀ dkv and dk = dAᵀ q; Pᵀ is computed."""
    n, h, b = this_program(tl.cdiv(L, C), H)
    DTYPE: tl.constexpr = k.dtype.element_ty
    j = n * C + tl.arange(0, C)
    exists = j < L
    kc, kc_exists = key_columns(K, KP)
    vc, vc_exists = value_columns(V, VP)
    keys, values = pairs(exists, kc_exists), pairs(exists, vc_exists)
    key = load(tile(k, b, j, h, kc, L, H, K), keys, ACC)
    key = rotated(key, cos, sin, j, exists, 1.0, K, KP, ACC).to(DTYPE)
    value = load(tile(v, b, j, h, vc, L, H, V), values, DTYPE)
    segment = tl.load(ids + b * L + j, mask=exists, other=-1)
    d_key, d_value = tl.zeros((C, KP), ACC), tl.zeros((C, VP), ACC)
    held = L - T
    for begin in range(tl.maximum(n * C - held, 0), tl.minimum(n * C + C - 1 + window - held, T), BLOCK):
        token = begin + tl.arange(0, BLOCK)
        there = token < T
        position = held + token
        query = load(tile(q, b, token, h, kc, T, H, K), pairs(there, kc_exists), ACC)
        query = rotated(query, cos, sin, position, there, 1.0, K, KP, ACC).to(DTYPE)
        own = tl.load(ids + b * L + position, mask=there, other=-2)
        score = scale * product(key, tl.trans(query), DTYPE)
        score -= load(log_total + (b * H + h) * T + token, there, ACC)[None, :]
        reach = tl.trans(visible(position, own, j, segment, L, window))
        weight = tl.exp(tl.where(reach, score, float("-inf")))
        d_read = load(tile(d_kv, b, token, h, vc, T, H, V), pairs(there, vc_exists), DTYPE)
        d_value += product(weight, d_read, DTYPE)
        slope = load(kv_slope + (b * H + h) * T + token, there, ACC)[None, :]
        d_score = scale * weight * (product(value, tl.trans(d_read), DTYPE) - slope)
        d_key += product(d_score, query, DTYPE)
    store(tile(dk, b, j, h, kc, L, H, K), rotated(d_key, cos, sin, j, exists, -1.0, K, KP, ACC), keys)
    store(tile(dv, b, j, h, vc, L, H, V), d_value, values)
