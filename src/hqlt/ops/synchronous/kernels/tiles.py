"""Building blocks of the kernels: addresses of tiles, φ, rotary embedding, products, inverse of a unit triangle."""

import triton
import triton.language as tl


def kernel(function):
    """Compile once for all lengths and windows. (By default, Triton recompiles for 1 and for multiples of 16.)"""
    return triton.jit(do_not_specialize=["T", "L", "window", "slots"])(function)


@triton.jit
def this_program(count, H: tl.constexpr):
    """The chunk or slice (of `count`), the head and the row of this program."""
    program = tl.program_id(0)
    return program % count, program // count % H, (program // count // H).to(tl.int64)


@triton.jit
def key_columns(K: tl.constexpr, KP: tl.constexpr):
    """The columns of a key in a tile KP wide, and which of them exist.

    Each half of a key is padded separately, so that x_i and its rotary partner x_{i+K/2} are KP/2 apart.
    """
    half = (K + 1) // 2
    place = tl.arange(0, KP) % (KP // 2)
    column = tl.arange(0, KP) // (KP // 2) * half + place
    return column, (place < half) & (column < K)


@triton.jit
def value_columns(V: tl.constexpr, VP: tl.constexpr):
    """The columns of a value in a tile VP wide, and which of them exist."""
    column = tl.arange(0, VP)
    return column, column < V


@triton.jit
def tile(x, b, first, row, h, column, ROWS, H: tl.constexpr, WIDTH: tl.constexpr):
    """Addresses of rows (from `first` on) and columns of a head in x [b, ROWS, H, WIDTH].

    One 64-bit base address plus 32-bit offsets takes half the registers.
    """
    return x + ((b * ROWS + first) * H + h) * WIDTH + row[:, None] * (H * WIDTH) + column[None, :]


@triton.jit
def matrix(x, index, row, column, K: tl.constexpr, V: tl.constexpr):
    """Addresses of rows and columns of a matrix in x [index, K, V]."""
    return x + index * K * V + row[:, None] * V + column[None, :]


@triton.jit
def outer(row_exists, column_exists):
    """The mask of a tile, from those of its rows and columns."""
    return row_exists[:, None] & column_exists[None, :]


@triton.jit
def load(addresses, mask, DTYPE: tl.constexpr):
    """Load a tile; 0 where the mask is False, where memory is not accessed."""
    return tl.load(addresses, mask=mask, other=0.0).to(DTYPE)


@triton.jit
def finite(x, marks):
    """x with zeros in place of NaN and infinity, unless `marks` is None."""
    if marks is not None:
        x = tl.where(tl.abs(x) < float("inf"), x, 0.0)
    return x


@triton.jit
def marked(marks, at, exists):
    """Whether the rows at these indices are marked."""
    return tl.load(marks + at, mask=exists, other=0) != 0


@triton.jit
def nan_where(marks, at, exists, x):
    """x [rows] or [rows, ·], NaN in the rows that are marked, unless `marks` is None."""
    if marks is not None:
        nan = tl.where(marked(marks, at, exists), float("nan"), 0.0)
        x += nan if len(x.shape) == 1 else nan[:, None]
    return x


@triton.jit
def store(addresses, x, mask):
    tl.store(addresses, x.to(addresses.dtype.element_ty), mask=mask)


@triton.jit
def product(x, y, DTYPE: tl.constexpr):
    """The matrix product x y, with factors rounded to DTYPE and accumulation in at least float32."""
    return tl.dot(x.to(DTYPE), y.to(DTYPE), input_precision="ieee")


@triton.jit
def unit_silu(x):
    """φ: SiLU(x) / √(‖SiLU(x)‖² + 1e-6)."""
    x = x / (1 + tl.exp(-x))
    return x / tl.sqrt(tl.sum(x * x, axis=1) + 1e-6)[:, None]


@triton.jit
def unit_silu_backward(x, d_phi):
    """With z = SiLU(x) and φ = z / ‖z‖: dz = (dφ − φ (φ·dφ)) / ‖z‖, and dx = dz (σ + z (1 − σ))."""
    gamma = 1 / (1 + tl.exp(-x))
    z = x * gamma
    norm = tl.sqrt(tl.sum(z * z, axis=1) + 1e-6)[:, None]
    phi = z / norm
    dz = (d_phi - phi * tl.sum(phi * d_phi, axis=1)[:, None]) / norm
    return dz * (gamma + z * (1 - gamma))


@triton.jit
def angles(table, position, exists, K: tl.constexpr, KP: tl.constexpr, DTYPE: tl.constexpr):
    """Rows of a rotary table [·, K/2], as a tile KP/2 wide."""
    column = tl.arange(0, KP // 2)
    return load(table + position[:, None] * (K // 2) + column[None, :], outer(exists, column < K // 2), DTYPE)


@triton.jit
def rotated(x, cos, sin, position, exists, direction, K: tl.constexpr, KP: tl.constexpr, DTYPE: tl.constexpr):
    """x with the rotary embedding of `position` (direction 1), or its inverse (−1), on pairs (x_i, x_{i+K/2})."""
    if cos is not None:
        c = angles(cos, position, exists, K, KP, DTYPE)
        s = angles(sin, position, exists, K, KP, DTYPE) * direction
        halves = tl.permute(tl.reshape(x, (x.shape[0], 2, KP // 2)), (0, 2, 1))
        first, second = tl.split(halves)
        halves = tl.join(first * c - second * s, second * c + first * s)
        x = tl.reshape(tl.permute(halves, (0, 2, 1)), (x.shape[0], KP))
    return x


@triton.jit
def chunk_segments(ids, b, n, T, L, C: tl.constexpr):
    """Segments in chunk n of the T new tokens: of its tokens [C], of the matrix at its start, and of its last token.

    Negative n refers to chunks of held entries.
    """
    first = L - T + n * C
    own = tl.load(ids + b * L + tl.minimum(tl.maximum(first + tl.arange(0, C), 0), L - 1))
    before = tl.load(ids + b * L + first - 1, mask=first > 0, other=0)
    last = tl.load(ids + b * L + tl.minimum(first + C, L) - 1)
    return own, before, last


@triton.jit
def joined(D, A, length: tl.constexpr, PRECISION: tl.constexpr):
    """D − D M D, the inverse of diagonal blocks twice as long, where M holds the blocks of A between neighbors."""
    i = tl.arange(0, A.shape[0])[:, None] // length
    j = tl.arange(0, A.shape[0])[None, :] // length
    M = tl.where((i == j + 1) & (i // 2 == j // 2), A, 0.0)
    return D - tl.dot(tl.dot(D, M, input_precision=PRECISION), D, input_precision=PRECISION)


@triton.jit
def unit_triangle_inverse(A, C: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """(I + A)⁻¹ of a strictly lower triangular A [C, C]: diagonal blocks of 2 are inverted and joined pairwise.

    If the factors of these products are rounded (PRECISION "tf32"), one refinement D − D ((I + A) D − I) follows, with
    the residual computed from unrounded factors. It squares the rounding error.
    """
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    identity = (i == j).to(DTYPE)
    D = identity - tl.where((i == j + 1) & (i // 2 == j // 2), A, 0.0)
    for level in tl.static_range(1, 6):
        if 2 << level <= C:
            D = joined(D, A, 1 << level, PRECISION)
    if PRECISION == "tf32":
        residual = D - identity + tl.dot(A, D, input_precision="tf32x3")
        D -= tl.dot(D, residual, input_precision=PRECISION)
    return D
