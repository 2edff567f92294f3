"""Fast weights with any write rule of the family. Each file holds one implementation; all share one name and
signature."""

from __future__ import annotations

from typing import Any

import torch

from hqlt.ops.backend import empty_read, implementation
from hqlt.ops.fast_weights import chunked, fla, native, reference
from hqlt.ops.fast_weights.steps import Decay, Erase
from hqlt.ops.fla import Kind
from hqlt.ops.heads import match_heads
from hqlt.shapes import (
    Keys,
    Live,
    Matrix,
    Queries,
    Resets,
    Strengths,
    Values,
    at_least_float32,
    check_live,
    check_resets,
    match_floats,
)

__all__ = ["Decay", "Erase", "chunked", "fast_weights", "fla", "native", "reference"]


def fast_weights(
    q: Queries,
    k: Keys,
    v: Values,
    *,
    beta: Strengths | None = None,
    decay: Decay | None = None,
    erase: Erase = True,
    scale: float | None = None,
    state: Matrix | None = None,
    resets: Resets | None = None,
    live: Live | None = None,
    errors: bool = False,
    backend: str | None = None,
) -> tuple[Any, ...]:
    """Fast weights with any write rule of one family: decay, then m writes per token, then the read.

        S ← Diag(α_t) S      m times: S ← S + k ⊗ β (v − Sᵀ a)      out_t = scale · Sᵀ q_t

    Two other forms can be expressed in these terms. A rule that erases along e and writes along w,
    S ← S − e (aᵀ S) + w ⊗ v, takes two writes: k = e with v = 0, then k = w with a = 0. A rule that erases the value
    that S held before its decay passes a ⊘ α.

    The matrix is accumulated in at least float32. Tensors with a size of 0 give empty outputs; if k = 0, the output is
    zero.

    Args:
        q (`[b, t, g·h, k]`): Queries, already mapped by φ. Query head i reads the matrix of head i // g.
        k (`[b, m·t, h, k]`): Keys, already mapped by φ. The m ≥ 1 writes of a token are adjacent.
        v (`[b, m·t, h, v]`): Values.
        beta (`[b, m·t, h]`): Write strengths, 1 by default.
        decay (`[b, t, h]` or `[b, t, h, k]`): log α, at most 0: one decay per matrix, or one per row of it. α = 1 by
            default.
        erase: a, the key whose value is erased: True for k itself (the delta rule), False for none (a = 0, the additive
            rules), or a tensor `[b, m·t, h, k]`.
        scale: Factor of the output, k^-0.5 by default.
        state (`[b, h, k, v]`): The matrix before the first token, zeros by default.
        resets (`Bool[b, t]`): Tokens before which the matrix is reset to zero.
        live (`Bool[b, t]`): Tokens that decay the matrix and are written, all by default. Other tokens leave the matrix
            unchanged, whatever they hold; their queries still read.
        errors: If True, the errors v − Sᵀ a are returned, too.
        backend: Name of a backend; selected automatically by default (see `hqlt.ops.explain`).

    Returns:
        The outputs `[b, t, g·h, v]` in the dtype of v, the final matrix `[b, h, k, v]` in at least float32 and, if
        requested, the errors `[b, m·t, h, v]`, which have no gradient.

    Raises:
        ValueError: If shapes, dtypes or devices do not match, or the backend is unknown.

    Source:
        Yang et al. 2024, "Gated Delta Networks"; Siems et al. 2025, "DeltaProduct". `docs/rules.md` has a table of all
        rules.

    Example:
        >>> import torch, hqlt
        >>> q, k, v = torch.randn(3, 2, 5, 4, 8)
        >>> k, decay = hqlt.ops.unit_silu(k), -torch.rand(2, 5, 4)
        >>> gated_delta, state = hqlt.ops.fast_weights(q, k, v, beta=torch.rand(2, 5, 4), decay=decay)
        >>> retnet, state = hqlt.ops.fast_weights(q, k, v, decay=decay, erase=False)
    """
    others = {"state": (state, "b h k v"), "beta": (beta, "b m·t h")}
    if not isinstance(erase, bool):
        others["erase"] = erase, "b m·t h k"
    if decay is not None:
        others["decay"] = decay, "b t h k" if decay.dim() == 4 else "b t h"
    optional = {name: (x, axes) for name, (x, axes) in others.items() if x is not None}
    size = match_heads(match_floats(q=(q, "b t g·h k"), k=(k, "b m·t h k"), v=(v, "b m·t h v"), **optional))
    if size["m·t"] % max(size["t"], 1) or (size["m·t"] == 0) != (size["t"] == 0):
        raise ValueError(
            f"k: expected [b, m·t, h, k] with m·t a multiple of t = {size['t']}, the length of q, got {size['m·t']}"
        )
    check_resets(resets, size["b"], size["t"], q.device)
    check_live(live, size["b"], size["t"], q.device)
    wide = at_least_float32(v.dtype)
    state = q.new_zeros(*(size[x] for x in "bhkv"), dtype=wide) if state is None else state.to(wide)
    beta = k.new_ones(k.shape[:3], dtype=wide) if beta is None else beta
    kind = None  # flash-linear-attention has no kernel for the other calls
    if isinstance(erase, bool) and not errors:
        writes, axes = size["m·t"] // max(size["t"], 1), 0 if decay is None else decay.dim()
        kind = Kind("fast_weights", size["k"], size["v"], v.dtype, axes, erase, writes, resets is not None)
    run = implementation("fast_weights", q, backend, size, kind=kind)
    if size["t"] == 0:
        inputs = [x for x in (q, k, beta, decay, erase, state) if x is not None and not isinstance(x, bool)]
        read = empty_read(v, size["g·h"], *inputs)
        return (read, state, torch.empty_like(v, dtype=wide)) if errors else (read, state)
    scale = max(size["k"], 1) ** -0.5 if scale is None else scale
    options = {"errors": True} if errors else {}
    out, *rest = run(q, k, v, beta, decay, erase, scale=scale, state=state, resets=resets, live=live, **options)
    return out.to(v.dtype), *rest
