"""The FW-memory's read and write by any rule of the family: one name, one signature, an implementation a file."""

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
    """Fast weights by any write rule of one family: decay, then m writes, then the read.

        S ← Diag(α_t) S      m times: S ← S + k ⊗ β (v − Sᵀ a)      out_t = scale · Sᵀ q_t

    q: [b, t, g·h, k], k: [b, m·t, h, k], already mapped by φ; query head i reads the matrix of head i // g. v:
    [b, m·t, h, v]. The m writes of a token (m ≥ 1) lie next to each other. beta: [b, m·t, h], 1 where None. decay:
    log α, at most 0, [b, t, h], one for a matrix, or [b, t, h, k], one for each of its rows; None: α = 1. erase: a, the
    key whose value is erased: True for k itself (the delta rule), False for none (a = 0, the additive rules), or
    [b, m·t, h, k]. scale: k^-0.5 where None. state: the matrix before the first token [b, h, k, v], zeros where None.
    resets: Bool[b, t], the matrix is emptied before a marked token decays it. live: Bool[b, t], a token that is not
    marked leaves the matrix as it is, decay included, whatever it holds, and is read all the same; None: all are live.
    errors: return the errors v − Sᵀ a, too. backend: the name of one implementation, None picks (see
    `hqlt.ops.explain`).

    Two things are written in these terms. A rule that erases along e and writes along w, S ← S − e (aᵀ S) + w ⊗ v,
    takes two steps: k = e with v = 0, then k = w with a = 0. A rule that erases what S held before its decay takes
    a ⊘ α.

    → out [b, t, g·h, v] in v's dtype, the matrix after the last token [b, h, k, v] in at least float32, and if asked
    for the errors [b, m·t, h, v], through which no gradient goes. Runs in float64, float32 and bfloat16; the matrix
    accumulates in at least float32. Sizes of 0 give empty tensors, and reads of 0 where k is 0.

    Raises ValueError for shapes, dtypes and devices that do not fit, and for an unknown backend.

    Source: Yang et al. 2024, "Gated Delta Networks"; Siems et al. 2025, "DeltaProduct"; the table of `docs/rules.md`.
    """
    others = {"state": (state, "b h k v"), "beta": (beta, "b m·t h")}
    if not isinstance(erase, bool):
        others["erase"] = erase, "b m·t h k"
    if decay is not None:
        others["decay"] = decay, "b t h k" if decay.dim() == 4 else "b t h"
    given = {name: (x, axes) for name, (x, axes) in others.items() if x is not None}
    pairs = {"k": (k, "b m·t h k"), "v": (v, "b m·t h v")}
    size = match_heads(match_floats(q=(q, "b t g·h k"), **pairs, **given))
    if size["m·t"] % max(size["t"], 1) or (size["m·t"] == 0) != (size["t"] == 0):
        raise ValueError(
            f"k: expected [b, m·t, h, k] with a multiple of t = {size['t']} writes, as q has tokens, got {size['m·t']}"
        )
    check_resets(resets, size["b"], size["t"], q.device)
    check_live(live, size["b"], size["t"], q.device)
    wide = at_least_float32(v.dtype)
    state = q.new_zeros(*(size[x] for x in "bhkv"), dtype=wide) if state is None else state.to(wide)
    beta = k.new_ones(k.shape[:3], dtype=wide) if beta is None else beta
    kind = None  # what flash-linear-attention has nothing for
    if isinstance(erase, bool) and not errors:
        writes, axes = size["m·t"] // max(size["t"], 1), 0 if decay is None else decay.dim()
        kind = Kind("fast_weights", size["k"], size["v"], v.dtype, axes, erase, writes, resets is not None)
    run = implementation("fast_weights", q, backend, size, kind=kind)
    if size["t"] == 0:
        inputs = [x for x in (q, k, beta, decay, erase, state) if x is not None and not isinstance(x, bool)]
        read = empty_read(v, size["g·h"], *inputs)
        return (read, state, torch.empty_like(v, dtype=wide)) if errors else (read, state)
    scale = max(size["k"], 1) ** -0.5 if scale is None else scale
    wants = {"errors": True} if errors else {}
    out, *others = run(q, k, v, beta, decay, erase, scale=scale, state=state, resets=resets, live=live, **wants)
    return out.to(v.dtype), *others
