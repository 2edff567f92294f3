"""The delta rule by flash-linear-attention's public kernels, for GPUs. Imported when called, not before.

A reset begins a sequence of its own: rows are laid end to end, and each segment of each row is one of the sequences
that `cu_seqlens` bounds. A row's first segment continues the row's state, the others begin with nothing, and the row's
final state is its last segment's.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hqlt.errors import how_to_install
from hqlt.ops.backend import register_backend
from hqlt.ops.heads import group, repeated
from hqlt.ops.segments import written
from hqlt.shapes import Keys, Live, Matrix, Queries, Resets, Strengths, Values

CHUNKED_DTYPES = (torch.bfloat16, torch.float16)
DTYPES = (*CHUNKED_DTYPES, torch.float32)
WIDEST_CHUNKED = 256


@register_backend("delta_rule", "fla")  # not tried on a GPU here yet: by name only
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
    check_runs(q, v)
    k, v, beta = written(live, k, v, beta)
    g = group(q, k)  # fla has a matrix for every query head: g equal ones
    k, v, beta = repeated(q, k, v, beta)
    state = state if g == 1 else state.repeat_interleave(g, dim=1)
    out, final = _segment_by_segment(q, k, v, beta, scale, state, resets)
    return out, final[:, ::g]


def _segment_by_segment(
    q: Queries, k: Keys, v: Values, beta: Strengths, scale: float, state: Matrix, resets: Resets | None
) -> tuple[Values, Matrix]:
    rule = _public_rule(q, v)
    q, k = q.to(v.dtype), k.to(v.dtype)
    if resets is None:
        out, final = rule(q, k, v, beta, scale=scale, initial_state=state, output_final_state=True)
        return out, final
    b, t = resets.shape
    begins = resets.clone()
    begins[:, 0] = True
    segment = begins.flatten().cumsum(0).view(b, t) - 1
    first, last = segment[:, 0], segment[:, -1]
    bounds = F.pad(begins.flatten().nonzero()[:, 0], (0, 1), value=b * t)
    carried = state.masked_fill(resets[:, 0, None, None, None], 0)
    initial = state.new_zeros(len(bounds) - 1, *state.shape[1:]).index_copy(0, first, carried)
    packed = (x.flatten(0, 1)[None] for x in (q, k, v, beta))
    out, final = rule(*packed, scale=scale, initial_state=initial, output_final_state=True, cu_seqlens=bounds)
    return out.view(v.shape), final[last]


def _public_rule(q: Tensor, v: Tensor) -> Callable[..., Any]:
    """By chunks, or token by token where there are few tokens or chunks are not offered."""
    try:
        module = importlib.import_module("fla.ops.delta_rule")
    except ImportError as error:
        raise RuntimeError(
            f"backend 'fla': expected the package fla-core, found none; {how_to_install('gpu')}, or name another one"
        ) from error
    by_chunks = q.shape[1] >= 64 and q.shape[3] <= WIDEST_CHUNKED and v.dtype in CHUNKED_DTYPES
    return module.chunk_delta_rule if by_chunks else module.fused_recurrent_delta_rule


def check_runs(q: Tensor, v: Tensor) -> None:
    """Refuse what the kernels cannot do here."""
    if not q.is_cuda:
        raise RuntimeError(f"backend 'fla': expected tensors on a GPU, got {q.device}; name another backend")
    if v.dtype not in DTYPES:
        raise ValueError(f"backend 'fla': expected one of {', '.join(map(str, DTYPES))}, got {v.dtype}")
