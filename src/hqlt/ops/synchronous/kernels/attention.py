"""The KV-memory: attention over the window with an online softmax, and its backward pass to queries and to entries."""

import triton
import triton.language as tl

from hqlt.ops.synchronous.kernels.tiles import (
    key_columns,
    load,
    outer,
    product,
    rotated,
    tile,
    value_columns,
)


@triton.jit
def visible(position, own, j, key_segment, L, window):
    """Mask of the entries j that the tokens at `position` see."""
    age = position[:, None] - j[None, :]
    return (age >= 0) & (age < window) & (j < L)[None, :] & (own[:, None] == key_segment[None, :])


@triton.jit
def attended(
    query, k, v, cos, sin, ids, own, first, b, h, scale: tl.constexpr, L, window,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, C: tl.constexpr,
    ACC: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The KV read [C, VP] of queries with rotary embedding, from position `first` on, and the logarithms of the softmax
    denominators [C]."""
    kc, kc_exists = key_columns(K, KP)
    vc, vc_exists = value_columns(V, VP)
    top = tl.full((C,), float("-inf"), ACC)
    total = tl.zeros((C,), ACC)
    read = tl.zeros((C, VP), ACC)
    i = tl.arange(0, C)
    position = first + i
    for begin in range(tl.maximum(first - window + 1, 0), tl.minimum(first + C, L), C):
        j = begin + i
        exists = j < L
        key = load(tile(k, b, begin, i, h, kc, L, H, K), outer(exists, kc_exists), ACC)
        key = rotated(key, cos, sin, j, exists, 1.0, K, KP, ACC)
        segment = tl.load(ids + b * L + j, mask=exists, other=-1)
        reach = visible(position, own, j, segment, L, window)
        score = tl.where(reach, scale * product(query, tl.trans(key), DTYPE), float("-inf"))
        higher = tl.maximum(top, tl.max(score, axis=1))
        level = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp(score - level[:, None])
        shrink = tl.exp(top - level)
        total = total * shrink + tl.sum(weight, axis=1)
        value = load(tile(v, b, begin, i, h, vc, L, H, V), outer(exists, vc_exists), DTYPE)
        read = read * shrink[:, None] + product(weight, value, DTYPE)
        top = higher
    total = tl.where(total > 0, total, 1.0)
    return read / total[:, None], tl.where(top == float("-inf"), 0.0, top) + tl.log(total)


@triton.jit
def query_backward(
    query, d_read, denominator, slope, k, v, cos, sin, ids, own, first, b, h, scale: tl.constexpr, L, window,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, C: tl.constexpr,
    ACC: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Gradient of the queries (with rotary embedding) through attention: dA k over the entries that they see, where
    dA = scale · P ∘ (dkv vᵀ − slope), slope = rowsum(dkv ∘ kv) and P = exp(scale · q kᵀ − denominator)."""
    kc, kc_exists = key_columns(K, KP)
    vc, vc_exists = value_columns(V, VP)
    i = tl.arange(0, C)
    position = first + i
    d_query = tl.zeros((C, KP), ACC)
    for begin in range(tl.maximum(first - window + 1, 0), tl.minimum(first + C, L), C):
        j = begin + i
        exists = j < L
        key = load(tile(k, b, begin, i, h, kc, L, H, K), outer(exists, kc_exists), ACC)
        key = rotated(key, cos, sin, j, exists, 1.0, K, KP, ACC).to(DTYPE)
        segment = tl.load(ids + b * L + j, mask=exists, other=-1)
        score = scale * product(query, tl.trans(key), DTYPE) - denominator[:, None]
        weight = tl.exp(tl.where(visible(position, own, j, segment, L, window), score, float("-inf")))
        value = load(tile(v, b, begin, i, h, vc, L, H, V), outer(exists, vc_exists), DTYPE)
        d_score = scale * weight * (product(d_read, tl.trans(value), DTYPE) - slope[:, None])
        d_query += product(d_score, key, DTYPE)
    return d_query


@triton.jit
def entry_backward(
    key, value, first, segment, q, cos, sin, ids, d_kv, log_total, kv_slope, b, h, scale: tl.constexpr,
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
    for g in range(G):
        reader = h * G + g
        for begin in range(tl.maximum(first - held, 0), tl.minimum(first - held + C - 1 + window, T), BLOCK):
            token = begin + i
            exists = token < T
            position = held + token
            query = load(tile(q, b, begin, i, reader, kc, T, H * G, K), outer(exists, kc_exists), ACC)
            query = rotated(query, cos, sin, position, exists, 1.0, K, KP, ACC).to(DTYPE)
            own = tl.load(ids + b * L + position, mask=exists, other=-2)
            at = (b * H * G + reader) * T + token
            score = scale * product(key, tl.trans(query), DTYPE) - load(log_total + at, exists, ACC)[None, :]
            reach = tl.trans(visible(position, own, j, segment, L, window))
            weight = tl.exp(tl.where(reach, score, float("-inf")))
            d_read = load(tile(d_kv, b, begin, i, reader, vc, T, H * G, V), outer(exists, vc_exists), DTYPE)
            d_value += product(weight, d_read, DTYPE)
            slope = load(kv_slope + at, exists, ACC)[None, :]
            d_score = scale * weight * (product(value, tl.trans(d_read), DTYPE) - slope)
            d_key += product(d_score, query, DTYPE)
    return d_key, d_value
