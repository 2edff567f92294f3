"""What the Triton kernels share: tiles of a sequence, products, the feature map φ, and how a kernel is launched.

Kernels take tensors as [b, t, h, width] with t·h·width contiguous; k and v may be views into a longer timeline, so the
distance between their batch rows is passed beside them. Program (i, …) works on head i % H of batch row i // H.
"""

# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False, ignore-errors=True

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PRECISION: tl.constexpr = tl.constexpr("tf32x3")
"""Of products of float32 tiles: three passes on the matrix units, as exact as float32. Halves are not affected."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def dot(x, y):
    """x @ y, accumulated in float32."""
    return tl.dot(x, y, input_precision=PRECISION)


@triton.jit
def load(x, first, end, stride, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """x[first : first + ROWS, column : column + COLUMNS], zeros from row `end` and from column WIDTH on."""
    rows, columns = tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    at = x + tl.cast(first, tl.int64) * stride + rows[:, None] * stride + columns[None, :]
    return tl.load(at, mask=(first + rows < end)[:, None] & (columns < WIDTH)[None, :], other=0.0)


@triton.jit
def store(x, tile, first, end, stride, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """The rows and columns that `load` with the same arguments would read."""
    rows, columns = tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    at = x + tl.cast(first, tl.int64) * stride + rows[:, None] * stride + columns[None, :]
    tl.store(at, tile.to(x.dtype.element_ty), mask=(first + rows < end)[:, None] & (columns < WIDTH)[None, :])


@triton.jit
def load_vector(x, first, end, stride, ROWS: tl.constexpr, other):
    """x[first : first + ROWS] with this distance between entries; `other` from `end` on."""
    rows = tl.arange(0, ROWS)
    return tl.load(x + tl.cast(first, tl.int64) * stride + rows * stride, mask=first + rows < end, other=other)


@triton.jit
def store_vector(x, vector, first, end, stride, ROWS: tl.constexpr):
    rows = tl.arange(0, ROWS)
    at = x + tl.cast(first, tl.int64) * stride + rows * stride
    tl.store(at, vector.to(x.dtype.element_ty), mask=first + rows < end)


@triton.jit
def unit(x):
    """φ(x) = SiLU(x) / √(‖SiLU(x)‖² + 1e-6) of each row, in float32."""
    x = x.to(tl.float32)
    activated = x * tl.sigmoid(x)
    return activated * tl.rsqrt(tl.sum(activated * activated, axis=1) + 1e-6)[:, None]


@triton.jit
def unit_backward(x, d):
    """The gradient of x from d = the gradient of φ(x). With s = SiLU(x) and ρ = (‖s‖² + 1e-6)^-½, φ = ρ s:

    ds = ρ (d − φ (φ·d))        dx = ds ∘ σ(x) (1 + x (1 − σ(x)))
    """
    x = x.to(tl.float32)
    gate = tl.sigmoid(x)
    activated = x * gate
    inverse_norm = tl.rsqrt(tl.sum(activated * activated, axis=1) + 1e-6)[:, None]
    feature = activated * inverse_norm
    d = inverse_norm * (d - feature * tl.sum(feature * d, axis=1)[:, None])
    return d * gate * (1 + x * (1 - gate))


@triton.jit
def start_of(x, i, batch_stride, H: tl.constexpr, WIDTH: tl.constexpr):
    """Where head i % H of batch row i // H begins in x [b, t, H, WIDTH]."""
    return x + tl.cast(i // H, tl.int64) * batch_stride + (i % H) * WIDTH


def block(width: int) -> int:
    """The tile that holds this many columns: a power of two, and at least the 16 of a matrix unit."""
    return max(16, triton.next_power_of_2(width))


def check(op: str, x: Tensor, **widths: int) -> None:
    """Refuse what the kernels cannot run, and say what can."""
    if x.dtype not in DTYPES:
        raise ValueError(
            f"{op}, backend 'triton': expected float32, bfloat16 or float16, "
            f"got {str(x.dtype).removeprefix('torch.')}; name another backend (None lets hqlt pick)"
        )
    if x.device.type == "cpu" and not triton.knobs.runtime.interpret:
        raise ValueError(
            f"{op}, backend 'triton': expected tensors on a GPU, got {x.device}; move them, name another backend, or "
            f"start Python with TRITON_INTERPRET=1 to interpret the kernels on the CPU, slowly"
        )
    for name, width in widths.items():
        if width > 256:
            raise ValueError(f"{op}, backend 'triton': expected heads of at most 256, got {name} = {width}")


def packed(x: Tensor | None) -> Tensor | None:
    """x with all axes but the first contiguous: a batch row is a block of memory."""
    if x is None or x.shape[0] == 0 or x[0].is_contiguous():
        return x
    return x.contiguous()
