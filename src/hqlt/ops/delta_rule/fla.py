"""The delta rule by the public kernels of flash-linear-attention."""

from __future__ import annotations

import torch

from hqlt.ops import fla
from hqlt.ops.backend import register_backend
from hqlt.ops.fast_weights import fla as family
from hqlt.ops.segments import written
from hqlt.shapes import Keys, Live, Matrix, Queries, Resets, Strengths, Values


@register_backend("delta_rule", "fla")
def delta_rule(
    q: Queries,
    k: Keys,
    v: Values,
    beta: Strengths,
    *,
    scale: float,
    state: Matrix,
    resets: Resets | None,
    live: Live | None,
) -> tuple[Values, Matrix]:
    if torch.compiler.is_compiling():  # as a single operator
        return family.fast_weights(q, k, v, beta, None, True, scale=scale, state=state, resets=resets, live=live)
    fla.check_runs(q, v)
    k, v, beta = written(live, k, v, beta)
    module = fla.public("delta_rule")
    by_chunks = q.shape[1] >= 64 and q.shape[3] <= fla.WIDEST_CHUNKED and v.dtype in fla.CHUNKED_DTYPES
    rule = module.chunk_delta_rule if by_chunks else module.fused_recurrent_delta_rule
    return fla.by_segments(rule, q, k, v, state=state, resets=resets, tensors={"beta": beta}, scale=scale)
