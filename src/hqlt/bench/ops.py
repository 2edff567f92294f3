"""The memories' reads and writes by themselves, against what a CPU user has today.

Counted are each operation's own multiplications and additions: 6·k·v a token and head forward and 14·k·v backward for
the delta rule, 4 and 10 for linear attention; 4 and 10 a pair and channel for attention, over the window.
"""

from __future__ import annotations

from collections.abc import Callable
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
    small = [(1, 70, 2, 8, 8)]
    races: dict[str, list[Callable[[int, float], list[Row]]]] = {
        "delta": [partial(delta_race, shape) for shape in (small if quick else DELTA_SHAPES)],
        "linear": [partial(linear_race, shape) for shape in (small if quick else DELTA_SHAPES[::3])],
        "window": [partial(window_race, 8, (1, 70, 2, 8))]
        if quick
        else [partial(window_race, 64, shape) for shape in WINDOW_SHAPES],
    }
    return [row for name in ONLY if only in (None, name) for race in races[name] for row in race(rounds, ceiling)]


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
    contestants = {
        backend: lambda backend=backend: linear_attention(*x, backend=backend)[0] for backend in ("chunked", "native")
    }
    unit = b * t * h * k * v
    measured = forward_and_backward(contestants, x, (4 * unit, 10 * unit), ceiling, rounds)
    return rows("linear attention", shape, measured)


def window_race(window: int, shape: tuple[int, int, int, int], rounds: int, ceiling: float) -> list[Row]:
    b, t, h, d = shape
    x = [torch.randn(b, t, h, d, requires_grad=True) for _ in range(3)]
    contestants = {"SDPA, band mask": partial(peers.band_attention, *x, window=window)}
    for backend in ("blocked", "native"):
        contestants[backend] = partial(window_attention, *x, window=window, backend=backend)
    unit = b * t * h * d
    full, of_full = {"SDPA, full causal": partial(peers.full_attention, *x)}, (2.0 * unit * t, 5.0 * unit * t)
    count = 4 * unit * window, 10 * unit * window
    measured = forward_and_backward(contestants, x, count, ceiling, rounds, beside=full, its_count=of_full)
    return rows(f"attention, window {window}", shape, measured)
