"""The FW-memory's read and write by the delta rule: one name, one signature, an implementation a file."""

from __future__ import annotations

from hqlt.ops.backend import empty_read, implementation
from hqlt.ops.delta_rule import chunked, fla, native, reference
from hqlt.ops.fla import Kind
from hqlt.ops.heads import match_scan
from hqlt.shapes import Keys, Live, Matrix, Queries, Resets, Strengths, Values, at_least_float32

__all__ = ["chunked", "delta_rule", "fla", "native", "reference"]


def delta_rule(
    q: Queries,
    k: Keys,
    v: Values,
    beta: Strengths,
    *,
    scale: float | None = None,
    state: Matrix | None = None,
    resets: Resets | None = None,
    live: Live | None = None,
    backend: str | None = None,
) -> tuple[Values, Matrix]:
    """Fast weights written by the delta rule, each token written before it is read.

        W_t = W_{t−1} + φk_t ⊗ β_t (v_t − W_{t−1}ᵀ φk_t)          out_t = scale · W_tᵀ φq_t

    q: [b, t, g·h, k], k: [b, t, h, k], already mapped by φ; query head i reads the matrix of head i // g. v:
    [b, t, h, v]. beta: [b, t, h], from 0 (write nothing) over 1 (replace) to 2 (reflect: a negative eigenvalue, needed
    to track state). scale: k^-0.5 where None. state: W_0 [b, h, k, v], zeros where None. resets: Bool[b, t], W is
    emptied before a marked token is written. live: Bool[b, t], a token that is not marked leaves W as it is, whatever
    its k, v and beta hold, and is read all the same; None: all are live. backend: the name of one implementation, None
    picks (see `hqlt.ops.explain`).

    → out [b, t, g·h, v] in v's dtype, W_t [b, h, k, v] in at least float32. Runs in float64, float32 and bfloat16;
    the matrix accumulates in at least float32. Sizes of 0 give empty tensors, and reads of 0 where k is 0.

    Raises ValueError for shapes, dtypes and devices that do not fit, and for an unknown backend.

    Source: Schlag, Irie, Schmidhuber 2021, "Linear Transformers Are Secretly Fast Weight Programmers", eq. 24.
    """
    held = {} if state is None else {"state": (state, "b h k v")}
    size = match_scan(q, k, v, resets, live, beta=(beta, "b t h"), **held)
    wide = at_least_float32(v.dtype)
    state = q.new_zeros(*(size[x] for x in "bhkv"), dtype=wide) if state is None else state.to(wide)
    kind = Kind("delta_rule", size["k"], size["v"], v.dtype, segments=resets is not None)
    run = implementation("delta_rule", q, backend, size, kind=kind)
    if size["t"] == 0:
        return empty_read(v, size["g·h"], q, k, beta, state), state
    scale = max(size["k"], 1) ** -0.5 if scale is None else scale
    out, state = run(q, k, v, beta, scale=scale, state=state, resets=resets, live=live)
    return out.to(v.dtype), state
