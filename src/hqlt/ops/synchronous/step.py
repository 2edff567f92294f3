"""One token through a synchronous layer between its projections, as one Triton kernel. Its readable twins are
`hqlt.ops.synchronous` and `hqlt.blend.Synchronous`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hqlt.ops.heads import match_heads
from hqlt.ops.synchronous.triton import check_runs, rotary_in
from hqlt.shapes import Keys, Matrix, Positions, Queries, Resets, Strengths, Values, check_resets, match


class Step(NamedTuple):
    """A token's output, and what is held after it, in tensors of their own."""

    y: Values
    keys: Keys
    values: Values
    matrix: Matrix
    position: Positions


@torch.no_grad()
def step(
    q: Queries,
    k: Keys,
    v: Values,
    beta: Strengths,
    gate: Values,
    norm_weight: Tensor,
    keys: Keys,
    values: Values,
    matrix: Matrix,
    position: Positions,
    *,
    decay: Strengths | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
    norm_eps: float = 1e-6,
    scale: float | None = None,
    resets: Resets | None = None,
) -> Step:
    """`hqlt.ops.synchronous` of one token, with the state that a layer holds between two tokens. Without gradients.

    q: [b, 1, g·h, k], k: [b, 1, h, k], v: [b, 1, h, v], beta: [b, 1, h], gate: [b, 1, g·h, v], norm_weight: [v],
    decay: log α [b, 1, h]; None: α = 1. resets: Bool[b, 1].
    Held: keys [b, s, h, k] and values [b, s, h, v] with s = window − 1, oldest first, the latest in slot s−1, of which
    a row that has seen fewer tokens uses the last ones; matrix [b, h, k, v]; position [b], tokens since the reset.
    rotary: (cos, sin) of at least s + 1 positions [·, 1, k/2], the token's own at row s. scale: k^-0.5 where None.

    → y [b, 1, g·h, v], and keys, values, matrix, position after the token: what was given is left as it was.

    Raises ValueError for shapes that do not fit, RuntimeError without triton or a GPU.
    """
    size = match_heads(match(
        q=(q, "b t g·h k"), k=(k, "b t h k"), v=(v, "b t h v"), beta=(beta, "b t h"), gate=(gate, "b t g·h v"),
        norm_weight=(norm_weight, "v"), keys=(keys, "b s h k"), values=(values, "b s h v"), matrix=(matrix, "b h k v"),
        position=(position, "b"), **({} if decay is None else {"decay": (decay, "b t h")}),
    ))  # fmt: skip
    if size["t"] != 1:
        raise ValueError(f"q: expected one token, [b, 1, g·h, k], got shape {list(q.shape)}; use hqlt.ops.synchronous")
    check_resets(resets, size["b"], 1)
    check_runs(q, v, widest=256)
    from hqlt.ops.synchronous.kernels.operators import one_token

    cos, sin = rotary_in(v.dtype, rotary)
    scale = size["k"] ** -0.5 if scale is None else scale
    held = keys, values, matrix, position
    return Step(*one_token(q, k, v, beta, gate, norm_weight, decay, cos, sin, resets, *held, scale, norm_eps))
