"""Attention over a window of KV entries. Each file holds one implementation; all share one name and signature."""

from __future__ import annotations

import torch

from hqlt.ops.backend import empty_read, implementation
from hqlt.ops.heads import match_heads
from hqlt.ops.segments import positions
from hqlt.ops.window_attention import blocked, dense, native, reference
from hqlt.ops.window_attention.beyond import Beyond
from hqlt.shapes import Keys, Queries, Resets, Values, check_resets, match_floats

__all__ = ["Beyond", "blocked", "dense", "native", "reference", "window_attention"]


def window_attention(
    q: Queries,
    k: Keys,
    v: Values,
    *,
    window: int | None,
    reach: str = "sliding",
    scale: float | None = None,
    resets: Resets | None = None,
    beyond: Beyond | None = None,
    backend: str | None = None,
) -> Values:
    """Softmax attention over a window of KV entries, and over entries that stay visible beyond it.

        out_t = Σ_j softmax_j(scale · q_t·k_j) v_j        over the entries j visible to token t, itself included

    Attention never crosses a reset. Time and memory grow as t · (window + beyond.most). Tensors with a size of 0 give
    empty outputs; if k = 0, all scores are 0 and the output is the mean of the visible values.

    Args:
        q (`[b, t, g·h, k]`): Queries. Query head i reads the entries of head i // g.
        k (`[b, l, h, k]`): Keys, l ≥ t. The last t belong to the queries' own tokens; those before them are held
            entries.
        v (`[b, l, h, v]`): Values.
        window: Number of tokens in the window, the token itself included; None for all.
        reach: `"sliding"`: token t sees the tokens t − window + 1 … t. `"chunk"`: it sees its own chunk of `window`
            tokens up to itself, where chunks are counted from the start of its segment.
        scale: Factor of the scores, k^-0.5 by default.
        resets (`Bool[b, l]`): Tokens that begin a segment.
        beyond: Entries that stay visible outside the window; none by default.
        backend: Name of a backend; selected automatically by default (see `hqlt.ops.explain`).

    Returns:
        The outputs `[b, t, g·h, v]`, in the dtype of q.

    Raises:
        ValueError: If shapes, dtypes or devices do not match, the window is below 1, or the reach or the backend is
            unknown.

    Example:
        >>> import torch, hqlt
        >>> q, k, v = torch.randn(3, 2, 5, 4, 8)
        >>> out = hqlt.ops.window_attention(q, k, v, window=3)
        >>> torch.equal(out[:, 0], v[:, 0])  # the first token sees only itself
        True
    """
    size = match_heads(match_floats(q=(q, "b t g·h k"), k=(k, "b l h k"), v=(v, "b l h v")))
    b, t, l = size["b"], size["t"], size["l"]
    check_resets(resets, b, l, q.device)
    if l < t:
        raise ValueError(f"k, v: expected at least as many entries as the {t} queries (their own), got {l}")
    if window is None:
        window = max(l, 1)
    if window < 1:
        raise ValueError(f"window: expected at least 1 (the token itself) or None for all, got {window}")
    if beyond is not None:
        check_beyond(beyond, q, k)
    if reach == "chunk":
        # The first token of a chunk sees nothing before itself, like the first token of a segment.
        resets = positions(resets, torch.zeros(b, dtype=torch.long, device=q.device), l) % window == 0
    elif reach != "sliding":
        raise ValueError(f'reach: expected "sliding" or "chunk", got {reach!r}')
    run = implementation("window_attention", q, backend, size, window=window)
    if t == 0:
        return empty_read(v, size["g·h"], q, k)
    scale = max(size["k"], 1) ** -0.5 if scale is None else scale
    more = {} if beyond is None else {"beyond": beyond}
    out: Values = run(q, k, v, window=window, scale=scale, resets=resets, **more)
    return out


def check_beyond(beyond: Beyond, q: Queries, k: Keys) -> None:
    expiry, most, q_far, k_far = beyond
    if expiry.shape != k.shape[:3] or expiry.dtype != torch.int64 or expiry.device != k.device:
        raise ValueError(
            f"beyond.expiry: expected int64 {list(k.shape[:3])} on {k.device}, one index per entry, got "
            f"{expiry.dtype} {list(expiry.shape)} on {expiry.device}"
        )
    if most < 0:
        raise ValueError(f"beyond.most: expected the number of entries that stay visible, at least 0, got {most}")
    wrong = [x for x, like in ((q_far, q), (k_far, k)) if x is not None and x.shape != like.shape]
    if wrong or (q_far is None) != (k_far is None):
        got = [None if x is None else list(x.shape) for x in (q_far, k_far)]
        raise ValueError(
            f"beyond.q, beyond.k: expected both, in the shapes of q {list(q.shape)} and k {list(k.shape)}, or neither, "
            f"got {got[0]} and {got[1]}"
        )
