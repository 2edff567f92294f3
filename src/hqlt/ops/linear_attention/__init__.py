"""The FW-memory's read and write by plain addition: one name, one signature, an implementation a file."""

from __future__ import annotations

from hqlt.ops.backend import NATIVE, Choice, Rule, choose, empty_read, implementation, register
from hqlt.ops.linear_attention import chunked, native, reference
from hqlt.ops.linear_attention.state import EPSILON as EPSILON
from hqlt.ops.linear_attention.state import LinearState as LinearState
from hqlt.shapes import Keys, Queries, Resets, Values, at_least_float32, check_resets, match_floats

IMPLEMENTATIONS = register(
    {
        "reference": reference.linear_attention,
        "chunked": chunked.linear_attention,
        "native": native.linear_attention,
    }
)
RULES = (
    NATIVE,
    Rule("reference", lambda q: q.shape[1] <= 1, "one token or none: the equation itself takes the fewest calls"),
    Rule("chunked", lambda q: True, "many tokens: matrix products over chunks"),
)


def linear_attention(
    q: Queries,
    k: Keys,
    v: Values,
    *,
    state: LinearState | None = None,
    resets: Resets | None = None,
    backend: str | None = None,
) -> tuple[Values, LinearState]:
    """Fast weights written by addition and read with a normaliser that sums over time.

        W_t = W_{t−1} + φk_t ⊗ v_t      z_t = z_{t−1} + φk_t      out_t = W_tᵀ φq_t / (z_t·φq_t + 1e-10)

    q, k: [b, t, h, k], already mapped by a positive φ. v: [b, t, h, v]. state: (W_0 [b, h, k, v], z_0 [b, h, k]),
    zeros where None. resets: Bool[b, t], the memory is emptied before a marked token is written. backend: the name
    of one implementation, None picks. The read has no scale: the normaliser would cancel it.

    → out [b, t, h, v] in v's dtype, LinearState in at least float32. An empty memory reads as zero. Sizes of 0 give
    empty tensors, and reads of 0 where k is 0.

    Raises ValueError for shapes, dtypes and devices that do not fit, and for an unknown backend.

    Source: Katharopoulos et al. 2020, "Transformers are RNNs", eqs. 18–20.
    """
    held = {} if state is None else {"matrix": (state[0], "b h k v"), "key_sum": (state[1], "b h k")}
    size = match_floats(q=(q, "b t h k"), k=(k, "b t h k"), v=(v, "b t h v"), **held)
    check_resets(resets, size["b"], size["t"], q.device)
    dtype = at_least_float32(v.dtype)
    if state is None:
        matrix = q.new_zeros(size["b"], size["h"], size["k"], size["v"], dtype=dtype)
        state = LinearState(matrix, matrix.new_zeros(matrix.shape[:3]))
    else:
        state = LinearState(state[0].to(dtype), state[1].to(dtype))
    run = implementation(IMPLEMENTATIONS, explain(q, backend=backend), *size.values())
    if size["t"] == 0:
        return empty_read(v, q, k, *state), state
    out, state = run(q, k, v, state=state, resets=resets)
    return out.to(v.dtype), state


def explain(q: Queries, *, backend: str | None = None) -> Choice:
    return choose("linear_attention", IMPLEMENTATIONS, RULES, q, backend)
