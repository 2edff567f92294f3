"""The FW-memory's read and write by plain addition: one name, one signature, an implementation a file."""

from __future__ import annotations

from hqlt.ops.backend import empty_read, implementation
from hqlt.ops.heads import match_scan
from hqlt.ops.linear_attention import chunked, native, reference
from hqlt.ops.linear_attention.state import EPSILON, LinearState
from hqlt.shapes import Keys, Live, Queries, Resets, Values, at_least_float32

__all__ = ["EPSILON", "LinearState", "chunked", "linear_attention", "native", "reference"]


def linear_attention(
    q: Queries,
    k: Keys,
    v: Values,
    *,
    state: LinearState | None = None,
    resets: Resets | None = None,
    live: Live | None = None,
    backend: str | None = None,
) -> tuple[Values, LinearState]:
    """Fast weights written by addition and read with a normaliser that sums over time.

        W_t = W_{t−1} + φk_t ⊗ v_t      z_t = z_{t−1} + φk_t      out_t = W_tᵀ φq_t / (z_t·φq_t + 1e-10)

    q: [b, t, g·h, k], k: [b, t, h, k], already mapped by a positive φ; query head i reads the matrix of head i // g. v:
    [b, t, h, v]. state: (W_0 [b, h, k, v], z_0 [b, h, k]), zeros where None. resets: Bool[b, t], the memory is emptied
    before a marked token is written. live: Bool[b, t], a token that is not marked leaves the memory as it is, whatever
    its k and v hold, and is read all the same; None: all are live. backend: the name of one implementation, None picks.
    The read has no scale: the normaliser would cancel it.

    → out [b, t, g·h, v] in v's dtype, LinearState in at least float32. An empty memory reads as zero. Sizes of 0 give
    empty tensors, and reads of 0 where k is 0.

    Raises ValueError for shapes, dtypes and devices that do not fit, and for an unknown backend.

    Source: Katharopoulos et al. 2020, "Transformers are RNNs", eqs. 18–20.
    """
    held = {} if state is None else {"matrix": (state[0], "b h k v"), "key_sum": (state[1], "b h k")}
    size = match_scan(q, k, v, resets, live, **held)
    wide = at_least_float32(v.dtype)
    if state is None:
        matrix = q.new_zeros(*(size[x] for x in "bhkv"), dtype=wide)
        state = LinearState(matrix, matrix.new_zeros(matrix.shape[:3]))
    else:
        state = LinearState(state[0].to(wide), state[1].to(wide))
    run = implementation("linear_attention", q, backend, size)
    if size["t"] == 0:
        return empty_read(v, size["g·h"], q, k, *state), state
    out, state = run(q, k, v, state=state, resets=resets, live=live)
    return out.to(v.dtype), state
