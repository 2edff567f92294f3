"""flash-linear-attention's public GPU kernels behind this package's signatures. They are imported on first use.

Resets become sequence boundaries: the rows are concatenated, and each segment of each row is one of the sequences that
`cu_seqlens` delimits. A row's first segment continues from the row's state, the others from zeros, and the row's final
state is that of its last segment.
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
"""Tokens per chunk; for fewer tokens these kernels do not pay."""
TOLERANCE = {torch.bfloat16: 5e-2, torch.float16: 6e-3, torch.float32: 5e-3}
"""Largest accepted error of a result, relative to the norm of the reference's in float64."""


class Kind(NamedTuple):
    """What distinguishes calls that run different kernels."""

    op: str
    k: int
    """Key width."""
    v: int
    """Value width."""
    dtype: torch.dtype
    decay: int = 0
    """Number of axes of log α; 0 without decay."""
    erases: bool = True
    """Whether the value stored under k is erased."""
    writes: int = 1
    """Writes per token."""
    segments: bool = False
    """Whether there are resets."""


def on_gpu(q: Tensor) -> bool:
    return q.is_cuda


def find_mismatch(kind: Kind, run: Callable[..., Any], reference: Callable[..., Any], device: int | None) -> str:
    """Why `run` must not be used for calls of this kind: its exception, or how it differs from the reference; else "".

    Both are called on the same small inputs, the reference in float64. Outputs, final matrix and all gradients are
    compared.
    """
    place = torch.device("cpu" if device is None else f"cuda:{device}")
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(place.type, enabled=False):
        try:
            inputs = _inputs(kind, place)
            got = _results(kind, run, inputs)
        except Exception as refusal:  # whatever a kernel, a compiler or a driver raises
            return first_line(refusal)
        wide = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
        for name, expected in _results(kind, reference, wide).items():
            error = ((got[name].double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()
            if not error < TOLERANCE.get(kind.dtype, 1e-6):
                return f"its {name} differs from the reference's by {error:.0e} of the norm on this GPU"
    return ""


def _inputs(kind: Kind, device: torch.device) -> dict[str, Tensor]:
    """Inputs by name: two rows, two heads, two chunks and a partial one; q and k are normalized, as φ leaves them. The
    global random state is not touched."""
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


def _results(kind: Kind, run: Callable[..., Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Results by name: the output, the final matrix, and the gradients of the sum of their squares."""
    arguments = {name: x.clone().requires_grad_(x.is_floating_point()) for name, x in inputs.items()}
    resets, leaves = arguments.pop("resets", None), dict(arguments)
    q, k, v, beta, state = (arguments.pop(name) for name in ("q", "k", "v", "beta", "state"))
    others = () if kind.op == "delta_rule" else (arguments.get("decay"), kind.erases)
    out, matrix = run(q, k, v, beta, *others, scale=kind.k**-0.5, state=state, resets=resets, live=None)[:2]
    loss = out.double().square().sum() + matrix.double().square().sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    named = {f"gradient of {name}": x for name, x in zip(leaves, gradients, strict=True)}
    return {"output": out.detach(), "matrix": matrix.detach(), **named}


def check_runs(q: Tensor, v: Tensor) -> None:
    """Raise an error if the kernels do not support this device or dtype."""
    if not q.is_cuda:
        raise RuntimeError(f"backend 'fla': expected tensors on a GPU, got {q.device}; name another backend")
    if v.dtype not in DTYPES:
        raise ValueError(f"backend 'fla': expected one of {', '.join(map(str, DTYPES))}, got {v.dtype}")


def public(module: str) -> ModuleType:
    """Import the public module `fla.ops.…`."""
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
    """A kernel's output and final matrix, with segments as sequences.

    tensors: further inputs of shape [b, t, h, …], by the kernel's names for them.
    """
    g = group(q, k)  # fla holds one matrix per query head: g equal ones
    k, v, *others = repeated(q, k, v, *tensors.values())
    inputs = {"q": q.to(v.dtype), "k": k.to(v.dtype), "v": v, **dict(zip(tensors, others, strict=True))}
    state = state if g == 1 else state.repeat_interleave(g, dim=1)
    if resets is None:
        out, final = rule(**inputs, initial_state=state, output_final_state=True, **options)
        return out, final[:, ::g]
    b, t = resets.shape
    begins = resets.clone()
    begins[:, 0] = True
    segment = begins.flatten().cumsum(0).view(b, t) - 1
    first, last = segment[:, 0], segment[:, -1]
    bounds = F.pad(begins.flatten().nonzero()[:, 0], (0, 1), value=b * t)
    carried = state.masked_fill(resets[:, 0, None, None, None], 0)
    initial = state.new_zeros(len(bounds) - 1, *state.shape[1:]).index_copy(0, first, carried)
    packed = {name: x.flatten(0, 1)[None] for name, x in inputs.items()}
    out, final = rule(**packed, initial_state=initial, output_final_state=True, cu_seqlens=bounds, **options)
    return out.view(b, t, *out.shape[2:]), final[last][:, ::g]
