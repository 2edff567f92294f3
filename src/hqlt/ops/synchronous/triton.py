"""A synchronous layer's memories, mixer and norm as Triton kernels (`hqlt.ops.synchronous.kernels`).

Runs on a GPU, or on a CPU where TRITON_INTERPRET=1 was set before the first call: right, very slow, for tests.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hqlt.shapes import Keys, Matrix, Queries, Resets, Strengths, Values

WIDEST = 128
"""A head's largest width: a chunk's tiles and the matrix have to fit into one multiprocessor."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def synchronous(
    q: Queries,
    k: Keys,
    v: Values,
    beta: Strengths,
    gate: Values,
    norm_weight: Tensor,
    *,
    window: int,
    rotary: tuple[Tensor, Tensor] | None,
    norm_eps: float,
    scale: float,
    state: Matrix,
    resets: Resets | None,
) -> tuple[Values, Matrix]:
    check_runs(q, v)
    from hqlt.ops.synchronous.kernels.autograd import Synchronous

    q, k, gate = (x.to(v.dtype) for x in (q, k, gate))
    cos, sin = (None, None) if rotary is None else rotary
    y, matrix = Synchronous.apply(
        q, k, v, beta, gate, norm_weight, state, cos, sin, resets, min(window, k.shape[1]), scale, norm_eps
    )
    return y, matrix


def check_runs(q: Queries, v: Values) -> None:
    """Refuse what the kernels cannot do here."""
    try:
        import triton
    except ImportError as error:
        raise RuntimeError(
            "backend 'triton': expected the package triton, found none; pip install 'hqlt[gpu]', or name another "
            "backend"
        ) from error
    if not (q.is_cuda or triton.knobs.runtime.interpret):
        raise RuntimeError(
            f"backend 'triton': expected tensors on a GPU, got {q.device}; name another backend, or set "
            f"TRITON_INTERPRET=1 before the first call to run the kernels' code on a CPU, very slowly"
        )
    if v.dtype not in DTYPES:
        raise ValueError(f"backend 'triton': expected one of {', '.join(map(str, DTYPES))}, got {v.dtype}")
    if max(q.shape[3], v.shape[3]) > WIDEST:
        raise ValueError(
            f"backend 'triton': expected heads of at most {WIDEST} numbers, got k = {q.shape[3]} and v = {v.shape[3]}; "
            f"name another backend"
        )
