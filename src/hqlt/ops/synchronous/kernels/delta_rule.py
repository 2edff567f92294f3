"""The FW-memory over chunks, as in `hqlt.ops.delta_rule.chunked`, without the read."""

import triton
import triton.language as tl

from hqlt.ops.synchronous.kernels.decay import between, from_start, throughout, to_end
from hqlt.ops.synchronous.kernels.tiles import (
    chunk_segments,
    finite,
    kernel,
    key_columns,
    load,
    matrix,
    outer,
    product,
    store,
    this_program,
    tile,
    unit_silu,
    unit_triangle_inverse,
    value_columns,
)


@triton.jit
def within_chunk(phi, key, own, C: tl.constexpr, DTYPE: tl.constexpr):
    """tril(φQ φKᵀ) [C, C], between tokens of the same segment."""
    i = tl.arange(0, C)
    reaches = (i[:, None] >= i[None, :]) & (own[:, None] == own[None, :])
    return tl.where(reaches, product(phi, tl.trans(key), DTYPE), 0.0)


@kernel
def prepare(
    k, v, beta, decay, ids, lost, unit_k, inverse, Y, U, T, L,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, C: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Computes, for each chunk, φ(k), (I + L)⁻¹ with L = tril(β φK φKᵀ, −1), decayed, and Y and U of the WY form."""
    n, h, b = this_program(tl.cdiv(T, C), H)
    DTYPE: tl.constexpr = k.dtype.element_ty
    i = tl.arange(0, C)
    token = n * C + i
    exists = token < T
    kc, kc_exists = key_columns(K, KP)
    vc, vc_exists = value_columns(V, VP)
    own, before, _ = chunk_segments(ids, b, n, T, L, C)

    key = finite(load(tile(k, b, L - T + n * C, i, h, kc, L, H, K), outer(exists, kc_exists), ACC), lost)
    key = unit_silu(key).to(DTYPE)
    store(tile(unit_k, b, n * C, i, h, kc, T, H, K), key, outer(exists, kc_exists))
    strength = load(beta + (b * T + token) * H + h, exists, ACC)

    reaches = (i[:, None] > i[None, :]) & (own[:, None] == own[None, :])
    gram = between(product(key, tl.trans(key), DTYPE), decay, b, n, h, T, H, C, ACC, 0)
    lower = tl.where(reaches, strength[:, None] * gram, 0.0)
    inverted = unit_triangle_inverse(lower, C, ACC, PRECISION)
    store(tile(inverse, b, n * C, i, h, i, T, H, C), inverted, outer(exists, i < C))

    # β and the decay scale the inverse's columns rather than the rows of φK and V, whose tiles are twice as wide.
    written = inverted * strength[None, :]
    value = finite(load(tile(v, b, L - T + n * C, i, h, vc, L, H, V), outer(exists, vc_exists), DTYPE), lost)
    store(tile(U, b, n * C, i, h, vc, T, H, V), product(written, value, DTYPE), outer(exists, vc_exists))
    sees = from_start((own == before)[:, None].to(ACC), decay, b, n, h, T, H, C, ACC)
    store(tile(Y, b, n * C, i, h, kc, T, H, K), product(written * tl.trans(sees), key, DTYPE), outer(exists, kc_exists))


@kernel
def carry(
    unit_k, Y, R, decay, ids, initial, S, final, T, L,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, C: tl.constexpr,
    ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Loops over chunks, for some columns of S: stores S at each chunk's start, replaces U by R = U − Y S, and
    continues with S + φKᵀ R, all decayed."""
    part, h, b = this_program(tl.cdiv(V, BLOCK), H)
    DTYPE: tl.constexpr = unit_k.dtype.element_ty
    kc, kc_exists = key_columns(K, KP)
    i, vc = tl.arange(0, C), part * BLOCK + tl.arange(0, BLOCK)
    mask = outer(kc_exists, vc < V)
    chunks = tl.cdiv(T, C)
    now = load(matrix(initial, b * H + h, kc, vc, K, V), mask, ACC)
    for n in range(chunks):
        token = n * C + i
        exists = token < T
        own, before, last = chunk_segments(ids, b, n, T, L, C)
        store(matrix(S, (b * chunks + n) * H + h, kc, vc, K, V), now, mask)
        R_at = tile(R, b, n * C, i, h, vc, T, H, V)
        y = load(tile(Y, b, n * C, i, h, kc, T, H, K), outer(exists, kc_exists), DTYPE)
        r = load(R_at, outer(exists, vc < V), ACC) - product(y, now, DTYPE)
        store(R_at, r, outer(exists, vc < V))
        key = load(tile(unit_k, b, n * C, i, h, kc, T, H, K), outer(exists & (own == last), kc_exists), DTYPE)
        now = tl.where(before == last, throughout(now, decay, b, n, h, T, H, C, ACC), 0.0)
        now += product(tl.trans(key), to_end(r, decay, b, n, h, T, H, C, ACC), DTYPE)
    store(matrix(final, b * H + h, kc, vc, K, V), now, mask)
