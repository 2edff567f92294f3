"""A synchronous layer's memories, mixer and norm as Triton kernels (`hqlt.ops.synchronous.kernels`).

They run on a GPU. If TRITON_INTERPRET=1 is set before the first call, they also run on a CPU: correct, but very slow;
for tests.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from hqlt.errors import how_to_install
from hqlt.ops.backend import register_backend
from hqlt.ops.synchronous.inputs import Inputs
from hqlt.shapes import Matrix, Queries, Values

WIDEST = {torch.bfloat16: 256, torch.float16: 256, torch.float32: 128, torch.float64: 64}
"""Largest head width on a GPU: the tiles of a chunk and the matrix must fit into one multiprocessor."""


@register_backend("synchronous", "triton")
def synchronous(x: Inputs) -> tuple[Values, Matrix]:
    check_runs(x.q, x.v)
    from hqlt.ops.synchronous.kernels.operators import forward

    q, k, gate = (tensor.to(x.v.dtype) for tensor in (x.q, x.k, x.gate))
    cos, sin = rotary_in(x.v.dtype, x.rotary)
    window = min(x.window, k.shape[1])
    expiry = None if x.beyond is None else x.beyond.expiry.clamp(max=torch.iinfo(torch.int32).max).int()
    most = 0 if x.beyond is None else x.beyond.most
    y, matrix, *_ = forward(
        q, k, x.v, x.beta, gate, x.norm_weight, x.state, x.decay, cos, sin, x.resets, expiry, window, x.scale,
        x.norm_eps, most,
    )  # fmt: skip
    return y, matrix


def rotary_in(dtype: torch.dtype, rotary: tuple[Tensor, Tensor] | None) -> tuple[Tensor | None, Tensor | None]:
    """The rotary tables in at least `dtype`: triton 3.6 cannot compile a product of float64 and converted float32."""
    if rotary is None:
        return None, None
    cos, sin = (table.to(torch.promote_types(table.dtype, dtype)) for table in rotary)
    return cos, sin


def check_runs(q: Queries, v: Values, widest: int | None = None) -> None:
    """Raise an error if the kernels do not support these tensors here.

    widest: Largest supported head width; by default, it depends on the dtype.
    """
    if not _is_installed():
        raise RuntimeError(
            f"backend 'triton': expected the package triton, found none; {how_to_install('gpu')}, or name another one"
        )
    if not (q.is_cuda or _is_interpreted()):
        raise RuntimeError(
            f"backend 'triton': expected tensors on a GPU, got {q.device}; name another backend, or set "
            f"TRITON_INTERPRET=1 before the first call to run the kernels' code on a CPU, very slowly"
        )
    if v.dtype not in WIDEST:
        raise ValueError(f"backend 'triton': expected one of {', '.join(map(str, WIDEST))}, got {v.dtype}")
    widest = widest or WIDEST[v.dtype]
    if q.is_cuda and max(q.shape[3], v.shape[3]) > widest:
        raise ValueError(
            f"backend 'triton': expected head widths of at most {widest} in {v.dtype}, got k = {q.shape[3]} and "
            f"v = {v.shape[3]}; name another backend"
        )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_interpreted() -> bool:
    import triton

    return triton.knobs.runtime.interpret
