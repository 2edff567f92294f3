"""The FW-memory's read and write by the delta rule: one name, one signature, an implementation a file."""

from __future__ import annotations

from hqlt.ops.backend import NATIVE, Choice, Rule, choose, empty_read, implementation, register
from hqlt.ops.delta_rule import chunked, fla, native, reference
from hqlt.shapes import Keys, Matrix, Queries, Resets, Strengths, Values, at_least_float32, check_resets, match_floats

IMPLEMENTATIONS = register(
    {
        "reference": reference.delta_rule,
        "chunked": chunked.delta_rule,
        "native": native.delta_rule,
        "fla": fla.delta_rule,  # not tried on a GPU here yet: by name only
    }
)
RULES = (
    NATIVE,
    Rule("reference", lambda q: q.shape[1] <= 1, "one token or none: the equation itself takes the fewest calls"),
    Rule("chunked", lambda q: True, "many tokens: matrix products over chunks"),
)


def delta_rule(
    q: Queries,
    k: Keys,
    v: Values,
    beta: Strengths,
    *,
    scale: float | None = None,
    state: Matrix | None = None,
    resets: Resets | None = None,
    backend: str | None = None,
) -> tuple[Values, Matrix]:
    """Fast weights written by the delta rule, each token written before it is read.

        W_t = W_{t−1} + φk_t ⊗ β_t (v_t − W_{t−1}ᵀ φk_t)          out_t = scale · W_tᵀ φq_t

    q, k: [b, t, h, k], already mapped by φ (`hqlt.memory.fw`). v: [b, t, h, v]. beta: [b, t, h], from 0 (write
    nothing) over 1 (replace) to 2 (reflect: a negative eigenvalue, needed to track state).
    scale: k^-0.5 where None. state: W_0 [b, h, k, v], zeros where None. resets: Bool[b, t], W is emptied before a
    marked token is written. backend: the name of one implementation, None picks (see `hqlt.ops.explain`).

    → out [b, t, h, v] in v's dtype, W_t [b, h, k, v] in at least float32. Runs in float64, float32 and bfloat16;
    the matrix accumulates in at least float32. Sizes of 0 give empty tensors, and reads of 0 where k is 0.

    Raises ValueError for shapes, dtypes and devices that do not fit, and for an unknown backend.

    Source: Schlag, Irie, Schmidhuber 2021, "Linear Transformers Are Secretly Fast Weight Programmers", eq. 24.
    """
    size = match_floats(
        q=(q, "b t h k"), k=(k, "b t h k"), v=(v, "b t h v"), beta=(beta, "b t h"),
        **({} if state is None else {"state": (state, "b h k v")}),
    )  # fmt: skip
    check_resets(resets, size["b"], size["t"], q.device)
    if state is None:
        state = q.new_zeros(size["b"], size["h"], size["k"], size["v"], dtype=at_least_float32(v.dtype))
    else:
        state = state.to(at_least_float32(v.dtype))
    run = implementation(IMPLEMENTATIONS, explain(q, backend=backend), *size.values())
    if size["t"] == 0:
        return empty_read(v, q, k, beta, state), state
    scale = max(size["k"], 1) ** -0.5 if scale is None else scale
    out, state = run(q, k, v, beta, scale=scale, state=state, resets=resets)
    return out.to(v.dtype), state


def explain(q: Queries, *, backend: str | None = None) -> Choice:
    return choose("delta_rule", IMPLEMENTATIONS, RULES, q, backend)
