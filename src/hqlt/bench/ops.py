"""The memories' reads and writes by themselves, against what a CPU user has today.

Counted are each operation's own multiplications and additions: 6·k·v a token and head forward and 14·k·v backward for
the delta rule, 4 and 10 for linear attention; 4 and 10 a pair and channel for attention, over the window.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from hqlt.bench import peers
from hqlt.bench.race import Row, forward_and_backward, matrix_product_rate, rows
from hqlt.ops import delta_rule, linear_attention, window_attention

DELTA_SHAPES = [(8, 512, 4, 64, 64), (4, 1024, 2, 50, 50), (64, 256, 4, 32, 32), (1, 2048, 8, 128, 128)]
WINDOW_SHAPES = [(1, 2048, 4, 64), (1, 8192, 4, 64)]
ONLY = ("delta", "linear", "window")


def run(rounds: int, quick: bool, only: str | None) -> list[Row]:
    ceiling = matrix_product_rate(256 if quick else 1536)
    results: list[Row] = []
    for shape in [(1, 70, 2, 8, 8)] if quick else DELTA_SHAPES:
        if only in (None, "delta"):
            results += delta_race(shape, rounds, ceiling)
    for shape in [(1, 70, 2, 8, 8)] if quick else DELTA_SHAPES[:1] + DELTA_SHAPES[-1:]:
        if only in (None, "linear"):
            results += linear_race(shape, rounds, ceiling)
    for b, t, h, d in [(1, 70, 2, 8)] if quick else WINDOW_SHAPES:
        if only in (None, "window"):
            results += window_race(b, t, h, d, 8 if quick else 64, rounds, ceiling)
    return results


def delta_race(shape: tuple[int, int, int, int, int], rounds: int, ceiling: float) -> list[Row]:
    b, t, h, k, v = shape
    q, key = (F.normalize(torch.randn(b, t, h, k), dim=-1).requires_grad_() for _ in range(2))
    x = [q, key, torch.randn(b, t, h, v, requires_grad=True), torch.rand(b, t, h).requires_grad_()]
    contestants = {"transformers": lambda: peers.delta_rule(*x)[0]}
    for backend in ("chunked", "native"):
        contestants[backend] = lambda backend=backend: delta_rule(*x, backend=backend)[0]  # type: ignore[misc]
    unit = b * t * h * k * v
    return rows("delta rule", shape, forward_and_backward(contestants, x, (6 * unit, 14 * unit), ceiling, rounds))


def linear_race(shape: tuple[int, int, int, int, int], rounds: int, ceiling: float) -> list[Row]:
    b, t, h, k, v = shape
    x = [(F.elu(torch.randn(b, t, h, k)) + 1).requires_grad_() for _ in range(2)]
    x.append(torch.randn(b, t, h, v, requires_grad=True))
    contestants = {}
    for backend in ("chunked", "native"):
        contestants[backend] = lambda backend=backend: linear_attention(*x, backend=backend)[0]
    unit = b * t * h * k * v
    measured = forward_and_backward(contestants, x, (4 * unit, 10 * unit), ceiling, rounds)
    return rows("linear attention", shape, measured)


def window_race(b: int, t: int, h: int, d: int, window: int, rounds: int, ceiling: float) -> list[Row]:
    x = [torch.randn(b, t, h, d, requires_grad=True) for _ in range(3)]
    contestants = {"SDPA, band mask": partial(peers.band_attention, *x, window=window)}
    for backend in ("blocked", "native"):
        contestants[backend] = partial(window_attention, *x, window=window, backend=backend)
    unit = b * t * h * d
    measured = forward_and_backward(contestants, x, (4 * unit * window, 10 * unit * window), ceiling, rounds)
    full = {"SDPA, full causal": partial(peers.full_attention, *x)}
    # Full attention computes something else: the measure, not a contestant to be equal to.
    for what, row in forward_and_backward(full, x, (2 * unit * t, 5 * unit * t), ceiling, rounds).items():
        measured[what] = row | measured[what]
        slowest = row["SDPA, full causal"]["ms"]
        for of in measured[what].values():
            of["times faster"] = slowest / of["ms"]
    return rows(f"attention, window {window}", (b, t, h, d), measured)
