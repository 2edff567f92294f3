"""flash-linear-attention's public kernels under our signatures, for GPUs. Imported when called, not before.

A reset begins a sequence of its own: rows are laid end to end, and each segment of each row is one of the sequences
that `cu_seqlens` bounds. A row's first segment continues the row's state, the others begin with nothing, and the row's
final state is its last segment's.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hqlt.errors import how_to_install
from hqlt.ops.heads import group, repeated
from hqlt.shapes import Keys, Matrix, Queries, Resets, Values

CHUNKED_DTYPES = (torch.bfloat16, torch.float16)
DTYPES = (*CHUNKED_DTYPES, torch.float32)
WIDEST_CHUNKED = 256


def check_runs(q: Tensor, v: Tensor) -> None:
    """Refuse what the kernels cannot do here."""
    if not q.is_cuda:
        raise RuntimeError(f"backend 'fla': expected tensors on a GPU, got {q.device}; name another backend")
    if v.dtype not in DTYPES:
        raise ValueError(f"backend 'fla': expected one of {', '.join(map(str, DTYPES))}, got {v.dtype}")


def public(module: str) -> ModuleType:
    """`fla.ops.…`"""
    try:
        return importlib.import_module(f"fla.ops.{module}")
    except ImportError as error:
        raise RuntimeError(
            f"backend 'fla': expected the package fla-core, found none; {how_to_install('gpu')}, or name another one"
        ) from error


def by_segments(
    rule: Callable[..., Any],
    q: Queries,
    k: Keys,
    v: Values,
    *,
    state: Matrix,
    resets: Resets | None,
    tensors: dict[str, Tensor],
    **options: Any,
) -> tuple[Values, Matrix]:
    """What a kernel reads and holds, segment by segment. tensors: what else it takes of tokens, by its name for it."""
    g = group(q, k)  # fla has a matrix for every query head: g equal ones
    k, v, *others = repeated(q, k, v, *tensors.values())
    given = {"q": q.to(v.dtype), "k": k.to(v.dtype), "v": v, **dict(zip(tensors, others, strict=True))}
    state = state if g == 1 else state.repeat_interleave(g, dim=1)
    if resets is None:
        out, final = rule(**given, initial_state=state, output_final_state=True, **options)
        return out, final[:, ::g]
    b, t = resets.shape
    begins = resets.clone()
    begins[:, 0] = True
    segment = begins.flatten().cumsum(0).view(b, t) - 1
    first, last = segment[:, 0], segment[:, -1]
    bounds = F.pad(begins.flatten().nonzero()[:, 0], (0, 1), value=b * t)
    carried = state.masked_fill(resets[:, 0, None, None, None], 0)
    initial = state.new_zeros(len(bounds) - 1, *state.shape[1:]).index_copy(0, first, carried)
    packed = {name: x.flatten(0, 1)[None] for name, x in given.items()}
    out, final = rule(**packed, initial_state=initial, output_final_state=True, cu_seqlens=bounds, **options)
    return out.view(b, t, *out.shape[2:]), final[last][:, ::g]
