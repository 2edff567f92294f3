"""Fast weights written by plain addition. Each file holds one implementation; all share one name and signature."""

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
    """Linear attention: fast weights written by addition, with normalized reads.

        W_t = W_{t−1} + φk_t ⊗ v_t      z_t = z_{t−1} + φk_t      out_t = W_tᵀ φq_t / (z_t·φq_t + 1e-10)

    There is no scale, because the normalizer would cancel it. Reading an empty memory gives zero. Tensors with a size
    of 0 give empty outputs; if k = 0, the output is zero.

    Args:
        q (`[b, t, g·h, k]`): Queries, already mapped by a positive φ. Query head i reads the matrix of head i // g.
        k (`[b, t, h, k]`): Keys, already mapped by φ.
        v (`[b, t, h, v]`): Values.
        state: W_0 `[b, h, k, v]` and z_0 `[b, h, k]`, zeros by default.
        resets (`Bool[b, t]`): Tokens before which the memory is reset to zero.
        live (`Bool[b, t]`): Tokens that are written, all by default. Other tokens leave the memory unchanged, whatever
            their k and v hold; their queries still read.
        backend: Name of a backend; selected automatically by default (see `hqlt.ops.explain`).

    Returns:
        The outputs `[b, t, g·h, v]` in the dtype of v, and the final state in at least float32.

    Raises:
        ValueError: If shapes, dtypes or devices do not match, or the backend is unknown.

    Source:
        Katharopoulos et al. 2020, "Transformers are RNNs", eqs. 18–20.

    Example:
        >>> import torch, hqlt
        >>> q, k, v = torch.rand(3, 2, 5, 4, 8)
        >>> out, state = hqlt.ops.linear_attention(q, k, v)
        >>> more, state = hqlt.ops.linear_attention(q, k, v, state=state)  # continues where the first call ended
        >>> state.key_sum.shape
        torch.Size([2, 4, 8])
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
