"""One token through a synchronous layer's memories, mixer and norm."""

import triton.language as tl

from hqlt.ops.synchronous.kernels.tiles import (
    kernel,
    key_columns,
    load,
    matrix,
    outer,
    rotated,
    store,
    this_program,
    tile,
    unit_silu,
    value_columns,
)


@kernel
def step(
    q, k, v, beta, gate, norm_weight, decay, cos, sin, resets, keys, values, W, position,
    y, keys_after, values_after, W_after, position_after, slots,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr,
    BLOCK: tl.constexpr, ACC: tl.constexpr, scale: tl.constexpr, norm_eps: tl.constexpr,
):  # fmt: skip
    """One program per query head and row. Each query head of a group reads the matrix and the entries; the first also
    writes them."""
    _, reader, b = this_program(1, H * G)
    h = reader // G
    rows, written = tl.where(reader % G == 0, K, 0), tl.where(reader % G == 0, slots, 0)  # written by this program
    kc, kc_exists = key_columns(K, KP)
    vc, vc_exists = value_columns(V, VP)
    one = tl.arange(0, 1)
    here = one == 0
    key_mask, value_mask, square = outer(here, kc_exists), outer(here, vc_exists), outer(kc_exists, vc_exists)
    fresh = b < 0  # never
    if resets is not None:
        fresh = tl.load(resets + b)
    seen = tl.where(fresh, 0, tl.load(position + b))
    tl.store(position_after + b, seen + 1, mask=reader == 0)

    query = load(tile(q, b, 0, one, reader, kc, 1, H * G, K), key_mask, ACC)
    key = load(tile(k, b, 0, one, h, kc, 1, H, K), key_mask, ACC)
    value = load(tile(v, b, 0, one, h, vc, 1, H, V), value_mask, ACC)
    latest = slots - 1 + one
    store(
        tile(keys_after, b, slots - 1, one, h, kc, slots, H, K),
        key,
        outer((latest >= 0) & (latest < written), kc_exists),
    )
    store(
        tile(values_after, b, slots - 1, one, h, vc, slots, H, V),
        value,
        outer((latest >= 0) & (latest < written), vc_exists),
    )

    rotated_query = rotated(query, cos, sin, slots + one, here, 1.0, K, KP, ACC)
    top = scale * tl.sum(rotated_query * rotated(key, cos, sin, slots + one, here, 1.0, K, KP, ACC), axis=1)
    total = tl.full((1,), 1.0, ACC)
    kv = value
    for begin in range(0, slots, BLOCK):
        i = tl.arange(0, BLOCK)
        slot = begin + i
        exists = slot < slots
        held = (slots - slot <= seen) & exists
        entry = load(tile(keys, b, begin, i, h, kc, slots, H, K), outer(held, kc_exists), ACC)
        store(
            tile(keys_after, b, begin - 1, i, h, kc, slots, H, K),
            entry,
            outer((slot > 0) & (slot < written), kc_exists),
        )
        entry = rotated(entry, cos, sin, slot, exists, 1.0, K, KP, ACC)
        score = tl.where(held, scale * tl.sum(rotated_query * entry, axis=1), float("-inf"))
        higher = tl.maximum(top, tl.max(score, axis=0))
        weight = tl.exp(score - higher)
        shrink = tl.exp(top - higher)
        entry = load(tile(values, b, begin, i, h, vc, slots, H, V), outer(held, vc_exists), ACC)
        store(
            tile(values_after, b, begin - 1, i, h, vc, slots, H, V),
            entry,
            outer((slot > 0) & (slot < written), vc_exists),
        )
        total = total * shrink + tl.sum(weight, axis=0)
        kv = kv * shrink[:, None] + tl.sum(weight[:, None] * entry, axis=0)[None, :]
        top = higher
    kv /= total[:, None]

    before = load(matrix(W, b * H + h, kc, vc, K, V), square, ACC)
    if decay is not None:
        before *= tl.exp(load(decay + b * H + h + one, here, ACC))[:, None]
    before = tl.where(fresh, 0.0, before)
    phi = tl.trans(unit_silu(key))
    predicted = tl.sum(phi * before, axis=0)[None, :]
    after = before + phi * (load(beta + b * H + h + one, here, ACC)[:, None] * (value - predicted))
    store(matrix(W_after, b * H + h, kc, vc, K, V), after, outer(kc_exists & (kc < rows), vc_exists))
    fw = scale * tl.sum(tl.trans(unit_silu(query)) * after, axis=0)[None, :]

    gamma = 1 / (1 + tl.exp(-load(tile(gate, b, 0, one, reader, vc, 1, H * G, V), value_mask, ACC)))
    mix = kv + gamma * (fw - kv)
    mix *= 1 / tl.sqrt(tl.sum(mix * mix, axis=1) / V + norm_eps)[:, None]
    weight = load(norm_weight + vc, vc_exists, ACC)[None, :]
    store(tile(y, b, 0, one, reader, vc, 1, H * G, V), mix * weight, value_mask)
