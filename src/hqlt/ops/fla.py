"""flash-linear-attention's public kernels under our signatures, for GPUs. Imported when called, not before.

A reset begins a sequence of its own: rows are laid end to end, and each segment of each row is one of the sequences
that `cu_seqlens` bounds. A row's first segment continues the row's state, the others begin with nothing, and the row's
final state is its last segment's.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hqlt.errors import first_line, how_to_install
from hqlt.ops.heads import group, repeated
from hqlt.shapes import Keys, Matrix, Queries, Resets, Values

CHUNKED_DTYPES = (torch.bfloat16, torch.float16)
DTYPES = (*CHUNKED_DTYPES, torch.float32)
WIDEST_CHUNKED = 256
CHUNK = 64
"""Tokens of a chunk; fewer are not worth its kernels."""
TOLERANCE = {torch.bfloat16: 5e-2, torch.float16: 6e-3, torch.float32: 5e-3}
"""Of an answer, as a part of the reference's norm in float64."""


class Kind(NamedTuple):
    """Calls that run the same kernels."""

    op: str
    k: int
    v: int
    dtype: torch.dtype
    decay: int = 0
    """Axes of log α; 0: none."""
    erases: bool = True
    writes: int = 1
    segments: bool = False
    """Whether there are resets."""


def on_gpu(q: Tensor) -> bool:
    return q.is_cuda


def find_mismatch(kind: Kind, run: Callable[..., Any], reference: Callable[..., Any], device: int | None) -> str:
    """Why `run` is not to be used for calls of this kind: what it refuses, or how it differs from the reference.

    Both are called on the same small inputs, the reference in float64: outputs, final matrix and all gradients.
    """
    place = torch.device("cpu" if device is None else f"cuda:{device}")
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(place.type, enabled=False):
        try:
            inputs = _inputs(kind, place)
            got = _answers(kind, run, inputs)
        except Exception as refusal:  # whatever a kernel, a compiler or a driver raises
            return first_line(refusal)
        wide = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
        for name, right in _answers(kind, reference, wide).items():
            error = ((got[name].double() - right).norm() / right.norm().clamp(min=1e-30)).item()
            if not error < TOLERANCE.get(kind.dtype, 1e-6):
                return f"its {name} differs from the reference's by {error:.0e} of the norm on this GPU"
    return ""


def _inputs(kind: Kind, device: torch.device) -> dict[str, Tensor]:
    """By name: two chunks and a rest, of two rows and heads; q and k as φ makes them. The global seed is left alone."""
    random, (b, t, h) = torch.Generator().manual_seed(0), (2, 2 * CHUNK + 2, 2)
    n = kind.writes * t

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=random, dtype=torch.float64)

    q, k = F.normalize(normal(b, t, h, kind.k), dim=-1), F.normalize(normal(b, n, h, kind.k), dim=-1)
    narrow = {"q": q, "k": k, "v": normal(b, n, h, kind.v)}
    wide = {"beta": normal(b, n, h).sigmoid(), "state": normal(b, h, kind.k, kind.v)}
    if kind.decay:
        wide["decay"] = F.logsigmoid(normal(b, t, h, *[kind.k] * (kind.decay - 3)) + 2)
    inputs = {name: x.to(device, kind.dtype) for name, x in narrow.items()}
    inputs |= {name: x.to(device, torch.promote_types(kind.dtype, torch.float32)) for name, x in wide.items()}
    if kind.segments:
        inputs["resets"] = torch.zeros(b, t, dtype=torch.bool, device=device)
        inputs["resets"][0, CHUNK + 5] = inputs["resets"][1, 0] = True
    return inputs


def _answers(kind: Kind, run: Callable[..., Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """By name: what is read, the final matrix, the gradients of the sum of their squares."""
    given = {name: x.clone().requires_grad_(x.is_floating_point()) for name, x in inputs.items()}
    resets, leaves = given.pop("resets", None), dict(given)
    q, k, v, beta, state = (given.pop(name) for name in ("q", "k", "v", "beta", "state"))
    others = () if kind.op == "delta_rule" else (given.get("decay"), kind.erases)
    out, matrix = run(q, k, v, beta, *others, scale=kind.k**-0.5, state=state, resets=resets, live=None)[:2]
    loss = out.double().square().sum() + matrix.double().square().sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    named = {f"gradient of {name}": x for name, x in zip(leaves, gradients, strict=True)}
    return {"output": out.detach(), "matrix": matrix.detach(), **named}


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
