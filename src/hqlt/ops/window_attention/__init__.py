"""The KV-memory's read: one name, one signature, an implementation a file."""

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
    """Softmax attention over the most recent pairs, and over those that stay visible beyond them.

        out_t = Σ_j softmax_j(scale · q_t·k_j) v_j        over the j that token t can reach, itself among them

    With reach "sliding", t reaches the `window` latest tokens t−window+1 … t (None: all); with "chunk", those from the
    start of its own chunk of `window` tokens, chunks counted from the start of its segment. Neither crosses a reset.

    q: [b, t, g·h, k]. k: [b, l, h, k], v: [b, l, h, v] with l ≥ t: the last t pairs are the queries' own, those before
    were held from earlier; query head i reads the pairs of head i // g. resets: Bool[b, l], True at a token that begins
    a segment. scale: k^-0.5 where None. beyond: which of a segment's pairs stay visible outside that reach
    (`hqlt.ops.Beyond`: until when, and as what they are compared); None: none. backend: the name of one
    implementation, None picks.

    → out [b, t, g·h, v]. Time and memory grow as t · (window + beyond.most). Sizes of 0 give empty tensors, and where k
    is 0 the mean of the values in reach, because all scores are 0.

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
    if beyond is not None:
        _check_beyond(beyond, q, k)
    if reach == "chunk":
        # A chunk's first token reaches no further back, just as the first token of a segment.
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


def _check_beyond(beyond: Beyond, q: Queries, k: Keys) -> None:
    expiry, most, q_far, k_far = beyond
    if expiry.shape != k.shape[:3] or expiry.dtype != torch.int64 or expiry.device != k.device:
        raise ValueError(
            f"beyond.expiry: expected int64 {list(k.shape[:3])} on {k.device}, an index for each pair, got "
            f"{expiry.dtype} {list(expiry.shape)} on {expiry.device}"
        )
    if most < 0:
        raise ValueError(f"beyond.most: expected how many pairs stay visible, at least 0, got {most}")
    wrong = [x for x, like in ((q_far, q), (k_far, k)) if x is not None and x.shape != like.shape]
    if wrong or (q_far is None) != (k_far is None):
        given = [None if x is None else list(x.shape) for x in (q_far, k_far)]
        raise ValueError(
            f"beyond.q, beyond.k: expected both, in the shapes of q {list(q.shape)} and k {list(k.shape)}, or neither, "
            f"got {given[0]} and {given[1]}"
        )
