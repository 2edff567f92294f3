"""Decay of the matrix within a chunk. If decay is None, each function returns x unchanged, which compiles to nothing.

decay is log α [b, T, H], at most 0. Every exponent is a sum of log α, never a difference of two cumulative sums. So
nothing overflows, α = 0 needs no special case, and segments separated by a reset stay independent.
"""

import triton
import triton.language as tl

from hqlt.ops.synchronous.kernels.tiles import load


@triton.jit
def log_alpha(decay, b, n, h, T, H: tl.constexpr, C: tl.constexpr, ACC: tl.constexpr, AHEAD: tl.constexpr):
    """log α [C] of the tokens of chunk n, or, if AHEAD = 1, of the next token within the chunk; 0 if there is none."""
    i = tl.arange(0, C) + AHEAD
    token = n * C + i
    return load(decay + (b * T + token) * H + h, (token >= 0) & (token < T) & (i < C), ACC)


@triton.jit
def from_start(x, decay, b, n, h, T, H: tl.constexpr, C: tl.constexpr, ACC: tl.constexpr):
    """Rows x [C, ·] times the product of α from the chunk's first token through the row's own."""
    if decay is not None:
        x = x * tl.exp(tl.cumsum(log_alpha(decay, b, n, h, T, H, C, ACC, 0), axis=0))[:, None]
    return x


@triton.jit
def to_end(x, decay, b, n, h, T, H: tl.constexpr, C: tl.constexpr, ACC: tl.constexpr):
    """Rows x [C, ·] times the product of α from after the row's token to the chunk's last token."""
    if decay is not None:
        x = x * tl.exp(tl.cumsum(log_alpha(decay, b, n, h, T, H, C, ACC, 1), axis=0, reverse=True))[:, None]
    return x


@triton.jit
def throughout(x, decay, b, n, h, T, H: tl.constexpr, C: tl.constexpr, ACC: tl.constexpr):
    """x times the product of all α of the chunk."""
    if decay is not None:
        x = x * tl.exp(tl.sum(log_alpha(decay, b, n, h, T, H, C, ACC, 0), axis=0))
    return x


@triton.jit
def between(x, decay, b, n, h, T, H: tl.constexpr, C: tl.constexpr, ACC: tl.constexpr, LATER: tl.constexpr):
    """x [C, C] times the product of α from after the earlier token through the later one. Axis LATER holds the
    later."""
    if decay is not None:
        i = tl.arange(0, C)
        log = log_alpha(decay, b, n, h, T, H, C, ACC, 0)
        if LATER == 0:
            log = tl.where(i[:, None] > i[None, :], log[:, None], 0.0)
        else:
            log = tl.where(i[:, None] < i[None, :], log[None, :], 0.0)
        x = x * tl.exp(tl.cumsum(log, axis=LATER))
    return x
