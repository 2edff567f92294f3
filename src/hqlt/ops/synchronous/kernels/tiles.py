"""What the kernels are made of: addresses of tiles, φ, rotations, products, the inverse of a unit triangle."""

import triton
import triton.language as tl


def kernel(function):
    """Compile once for any number of tokens, KV entries and any window, not again for 1 and multiples of 16."""
    return triton.jit(do_not_specialize=["T", "L", "window", "slots"])(function)


@triton.jit
def this_program(count, H: tl.constexpr):
    """→ which of `count` chunks or slices, which head and which row this program is for."""
    program = tl.program_id(0)
    return program % count, program // count % H, (program // count // H).to(tl.int64)


@triton.jit
def key_columns(K: tl.constexpr, KP: tl.constexpr):
    """→ the columns of a key in a tile KP wide, and which of them exist.

    Each half of a key is padded by itself, so that x_i and its partner of the rotation x_{i+K/2} lie KP/2 apart.
    """
    half = (K + 1) // 2
    place = tl.arange(0, KP) % (KP // 2)
    column = tl.arange(0, KP) // (KP // 2) * half + place
    return column, (place < half) & (column < K)


@triton.jit
def value_columns(V: tl.constexpr, VP: tl.constexpr):
    """→ the columns of a value in a tile VP wide, and which of them exist."""
    column = tl.arange(0, VP)
    return column, column < V


@triton.jit
def tile(x, b, first, row, h, column, ROWS, H: tl.constexpr, WIDTH: tl.constexpr):
    """Addresses in x [b, ROWS, H, WIDTH] of some rows, from `first` on, and columns of a head.

    One 64-bit address, and 32 bits for what is added to it: half the registers.
    """
    return x + ((b * ROWS + first) * H + h) * WIDTH + row[:, None] * (H * WIDTH) + column[None, :]


@triton.jit
def matrix(x, index, row, column, K: tl.constexpr, V: tl.constexpr):
    """Addresses in x [index, K, V] of some rows and columns of a matrix."""
    return x + index * K * V + row[:, None] * V + column[None, :]


@triton.jit
def pairs(row_exists, column_exists):
    return row_exists[:, None] & column_exists[None, :]


@triton.jit
def load(addresses, mask, DTYPE: tl.constexpr):
    """Zero where the mask is false: memory of nobody is never read."""
    return tl.load(addresses, mask=mask, other=0.0).to(DTYPE)


@triton.jit
def store(addresses, x, mask):
    tl.store(addresses, x.to(addresses.dtype.element_ty), mask=mask)


@triton.jit
def product(x, y, DTYPE: tl.constexpr):
    """x y from factors rounded to DTYPE, accumulated in at least float32."""
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
    """Rows of a rotary table [·, K/2]: a tile KP/2 wide."""
    column = tl.arange(0, KP // 2)
    return load(table + position[:, None] * (K // 2) + column[None, :], pairs(exists, column < K // 2), DTYPE)


@triton.jit
def rotated(x, cos, sin, position, exists, turn, K: tl.constexpr, KP: tl.constexpr, DTYPE: tl.constexpr):
    """Each pair (x_i, x_{i+K/2}) rotated by its position's angle, times turn: 1, or −1 for the way back."""
    if cos is not None:
        c = angles(cos, position, exists, K, KP, DTYPE)
        s = angles(sin, position, exists, K, KP, DTYPE) * turn
        halves = tl.permute(tl.reshape(x, (x.shape[0], 2, KP // 2)), (0, 2, 1))
        first, second = tl.split(halves)
        turned = tl.join(first * c - second * s, second * c + first * s)
        x = tl.reshape(tl.permute(turned, (0, 2, 1)), (x.shape[0], KP))
    return x


@triton.jit
def chunk_segments(ids, b, n, T, L, C: tl.constexpr):
    """Segments in chunk n of the T new tokens: of its tokens [C], of the matrix at its start, of its last token.

    Negative n: chunks of the KV entries from before.
    """
    first = L - T + n * C
    own = tl.load(ids + b * L + tl.minimum(tl.maximum(first + tl.arange(0, C), 0), L - 1))
    before = tl.load(ids + b * L + first - 1, mask=first > 0, other=0)
    last = tl.load(ids + b * L + tl.minimum(first + C, L) - 1)
    return own, before, last


@triton.jit
def joined(D, A, length: tl.constexpr, PRECISION: tl.constexpr):
    """D − D M D: the inverse of diagonal blocks twice as long, with M the blocks of A that join them two by two."""
    i = tl.arange(0, A.shape[0])[:, None] // length
    j = tl.arange(0, A.shape[0])[None, :] // length
    M = tl.where((i == j + 1) & (i // 2 == j // 2), A, 0.0)
    return D - tl.dot(tl.dot(D, M, input_precision=PRECISION), D, input_precision=PRECISION)


@triton.jit
def unit_triangle_inverse(A, C: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """(I + A)⁻¹ of a strictly lower triangular A [C, C]: diagonal blocks of 2, joined two by two.

    Where the factors of these products are rounded (PRECISION "tf32"), D − D ((I + A) D − I) follows, its residual from
    unrounded ones: what rounding has cost is squared.
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
