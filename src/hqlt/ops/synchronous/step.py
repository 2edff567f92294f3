"""One token through everything between a synchronous layer's projections, as one Triton kernel. The readable
counterparts are `hqlt.ops.synchronous` and `hqlt.blend.Synchronous`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hqlt.ops.heads import match_heads
from hqlt.ops.synchronous.triton import check_runs, rotary_in
from hqlt.shapes import Keys, Matrix, Positions, Queries, Resets, Strengths, Values, check_resets, match


class Step(NamedTuple):
    """The token's output, and the state after it, as new tensors."""

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
    """`hqlt.ops.synchronous` for one token, with the state that a layer holds between tokens. Without gradients.

    The state passed in is not modified.

    Args:
        q (`[b, 1, g·h, k]`): Query.
        k (`[b, 1, h, k]`): Key.
        v (`[b, 1, h, v]`): Value.
        beta (`[b, 1, h]`): Write strength.
        gate (`[b, 1, g·h, v]`): Logits of the mixer's gate.
        norm_weight (`[v]`): Weight of the RMSNorm over each head.
        keys (`[b, s, h, k]`): Held keys with s = window − 1, oldest first, the latest in slot s − 1. A row that has
            seen fewer tokens uses the last slots.
        values (`[b, s, h, v]`): Held values.
        matrix (`[b, h, k, v]`): The FW-memory.
        position (`[b]`): Number of tokens since the last reset.
        decay (`[b, 1, h]`): log α; α = 1 by default.
        rotary: cos and sin of at least s + 1 positions, `[·, 1, k/2]` each; the token's own are in row s.
        norm_eps: Added to the mean square in the norm.
        scale: Factor of the FW read and of the attention scores, k^-0.5 by default.
        resets (`Bool[b, 1]`): Rows in which the token begins a segment.

    Returns:
        y `[b, 1, g·h, v]`, and keys, values, matrix and position after the token.

    Raises:
        ValueError: If shapes do not match.
        RuntimeError: If triton is not installed, or the tensors are not on a GPU.
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
