"""The KV-memory's read: one name, one signature, an implementation a file."""

from __future__ import annotations

import torch

from hqlt.ops.backend import empty_read, implementation
from hqlt.ops.heads import match_heads
from hqlt.ops.segments import positions
from hqlt.ops.window_attention import blocked, dense, native, reference
from hqlt.shapes import Keys, Queries, Resets, Values, check_resets, match_floats

__all__ = ["blocked", "dense", "native", "reference", "window_attention"]


def window_attention(
    q: Queries,
    k: Keys,
    v: Values,
    *,
    window: int | None,
    reach: str = "sliding",
    scale: float | None = None,
    resets: Resets | None = None,
    backend: str | None = None,
) -> Values:
    """Softmax attention over the most recent pairs.

        out_t = Σ_j softmax_j(scale · q_t·k_j) v_j        over the j that token t can reach, itself among them

    With reach "sliding", t reaches the `window` latest tokens t−window+1 … t (None: all); with "chunk", those from the
    start of its own chunk of `window` tokens, chunks counted from the start of its segment. Neither crosses a reset.

    q: [b, t, g·h, k]. k: [b, l, h, k], v: [b, l, h, v] with l ≥ t: the last t pairs are the queries' own, those before
    were held from earlier; query head i reads the pairs of head i // g. resets: Bool[b, l], True at a token that begins
    a segment. scale: k^-0.5 where None. backend: the name of one implementation, None picks.

    → out [b, t, g·h, v]. Time and memory grow as t·window. Sizes of 0 give empty tensors, and where k is 0 the mean of
    the values in reach, because all scores are 0.

    Raises ValueError for shapes, dtypes and devices that do not fit, a window below 1, an unknown reach or backend.
    """
    size = match_heads(match_floats(q=(q, "b t g·h k"), k=(k, "b l h k"), v=(v, "b l h v")))
    b, t, l = size["b"], size["t"], size["l"]
    check_resets(resets, b, l, q.device)
    if l < t:
        raise ValueError(f"k, v: expected at least as many pairs as the {t} queries (their own), got {l}")
    if window is None:
        window = max(l, 1)
    if window < 1:
        raise ValueError(f"window: expected at least 1 (the token itself) or None for all, got {window}")
    if reach == "chunk":
        # A chunk's first token reaches no further back, just as the first token of a segment.
        resets = positions(resets, torch.zeros(b, dtype=torch.long, device=q.device), l) % window == 0
    elif reach != "sliding":
        raise ValueError(f'reach: expected "sliding" or "chunk", got {reach!r}')
    run = implementation("window_attention", q, backend, size, window=window)
    if t == 0:
        return empty_read(v, size["g·h"], q, k)
    scale = max(size["k"], 1) ** -0.5 if scale is None else scale
    return run(q, k, v, window=window, scale=scale, resets=resets)
