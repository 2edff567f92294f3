"""Fast weights written by the delta rule. Each file holds one implementation; all share one name and signature."""

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
    """Fast weights written by the delta rule. Each token is written before its query reads.

        W_t = W_{t−1} + φk_t ⊗ β_t (v_t − W_{t−1}ᵀ φk_t)          out_t = scale · W_tᵀ φq_t

    The matrix is accumulated in at least float32. Tensors with a size of 0 give empty outputs; if k = 0, the output is
    zero.

    Args:
        q (`[b, t, g·h, k]`): Queries, already mapped by φ. Query head i reads the matrix of head i // g.
        k (`[b, t, h, k]`): Keys, already mapped by φ.
        v (`[b, t, h, v]`): Values.
        beta (`[b, t, h]`): Write strengths. 0 writes nothing and 1 replaces the value stored under the key. Up to 2 is
            allowed: above 1, the transition has a negative eigenvalue, which state tracking needs.
        scale: Factor of the output, k^-0.5 by default.
        state (`[b, h, k, v]`): W_0, zeros by default.
        resets (`Bool[b, t]`): Tokens before which the matrix is reset to zero.
        live (`Bool[b, t]`): Tokens that are written, all by default. Other tokens leave the matrix unchanged, whatever
            their k, v and beta hold; their queries still read.
        backend: Name of a backend; selected automatically by default (see `hqlt.ops.explain`).

    Returns:
        The outputs `[b, t, g·h, v]` in the dtype of v, and the final matrix `[b, h, k, v]` in at least float32.

    Raises:
        ValueError: If shapes, dtypes or devices do not match, or the backend is unknown.

    Source:
        Schlag, Irie and Schmidhuber 2021, "Linear Transformers Are Secretly Fast Weight Programmers", eq. 24.

    Example:
        >>> import torch, hqlt
        >>> q, k, v = torch.randn(3, 2, 5, 4, 8)
        >>> out, state = hqlt.ops.delta_rule(q, hqlt.ops.unit_silu(k), v, torch.ones(2, 5, 4))
        >>> out.shape, state.shape
        (torch.Size([2, 5, 4, 8]), torch.Size([2, 4, 8, 8]))
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
