"""Single operations, compared with what is available on a CPU today.

Each operation's own multiplications and additions are counted. The delta rule takes 6·k·v per token and head forward
and 14·k·v backward; linear attention and additive rules 4·k·v and 10·k·v. In both, the read takes 2·k·v and 4·k·v, and
each write the rest. Decay adds 1·k·v and 2·k·v. Attention takes 4 and 10 per query, entry in the window, and channel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hqlt.bench import peers
from hqlt.bench.race import Row, forward_and_backward, matrix_product_rate, rows
from hqlt.ops import Beyond, delta_rule, expiry, fast_weights, linear_attention, window_attention

DELTA_SHAPES = [(8, 512, 4, 64, 64), (4, 1024, 2, 50, 50), (64, 256, 4, 32, 32), (1, 2048, 8, 128, 128)]
WINDOW_SHAPES = [(1, 2048, 4, 64), (1, 8192, 4, 64)]
RETENTION_SHAPES = [(2, 2048, 4, 64), (1, 8192, 4, 64)]
ONLY = ("delta", "gated-delta", "kda", "gla", "two-writes", "linear", "window", "retention")
FULL = "SDPA, full causal"


def run(rounds: int, quick: bool, only: str | None) -> list[Row]:
    ceiling = matrix_product_rate(256 if quick else 1536)
    small = [(1, 70, 2, 8, 8)]
    shapes = small if quick else DELTA_SHAPES
    races: dict[str, list[Callable[[int, float], list[Row]]]] = {
        "delta": [partial(delta_race, shape) for shape in shapes],
        "gated-delta": [partial(gated_delta_race, shape) for shape in shapes],
        "kda": [partial(rows_race, "kda: decay by row", True, shape) for shape in shapes],
        "gla": [partial(rows_race, "gla: decay by row, erases nothing", False, shape) for shape in shapes],
        "two-writes": [partial(two_writes_race, shape) for shape in shapes],
        "linear": [partial(linear_race, shape) for shape in (small if quick else DELTA_SHAPES[::3])],
        "window": [partial(window_race, 8, (1, 70, 2, 8))]
        if quick
        else [partial(window_race, 64, shape) for shape in WINDOW_SHAPES],
        "retention": [partial(retention_race, 2, 6, (1, 70, 2, 8))]
        if quick
        else [partial(retention_race, 16, 48, shape) for shape in RETENTION_SHAPES],
    }
    return [row for name in ONLY if only in (None, name) for race in races[name] for row in race(rounds, ceiling)]


Shape = tuple[int, int, int, int, int]


def inputs(shape: Shape) -> list[Tensor]:
    """Random q, k, v and β."""
    b, t, h, k, v = shape
    q, key = (F.normalize(torch.randn(b, t, h, k), dim=-1).requires_grad_() for _ in range(2))
    return [q, key, torch.randn(b, t, h, v, requires_grad=True), torch.rand(b, t, h).requires_grad_()]


def gates(b: int, t: int, h: int) -> Tensor:
    """log α as initialized in Mamba-2: −A · dt, with A uniform in (1, 16) and dt log-uniform in (0.001, 0.1)."""
    return (-(1 + 15 * torch.rand(h)) * 10 ** (-3 + 2 * torch.rand(b, t, h))).requires_grad_()


def delta_race(shape: Shape, rounds: int, ceiling: float) -> list[Row]:
    x = inputs(shape)
    contestants = {"transformers": lambda: peers.delta_rule(*x)[0]}
    for backend in ("chunked", "native"):
        contestants[backend] = lambda backend=backend: delta_rule(*x, backend=backend)[0]  # type: ignore[misc]
    unit = math.prod(shape)
    return rows("delta rule", shape, forward_and_backward(contestants, x, (6 * unit, 14 * unit), ceiling, rounds))


def written(x: list[Tensor], **options: Any) -> dict[str, Callable[[], Tensor]]:
    """This package's implementations of one write rule. x: q, k, v, β and, with decay, log α."""
    q, k, v, beta, *decay = x
    options |= {"beta": beta, "decay": decay[0] if decay else None}
    return {name: lambda name=name: fast_weights(q, k, v, **options, backend=name)[0] for name in ("chunked", "native")}  # type: ignore[misc]


def gated_delta_race(shape: Shape, rounds: int, ceiling: float) -> list[Row]:
    x = [*inputs(shape), gates(*shape[:3])]
    contestants = {"transformers": lambda: peers.gated_delta_rule(*x)[0]} | written(x)
    unit = math.prod(shape)
    return rows("gated delta rule", shape, forward_and_backward(contestants, x, (7 * unit, 16 * unit), ceiling, rounds))


def rows_race(case: str, erase: bool, shape: Shape, rounds: int, ceiling: float) -> list[Row]:
    """Decay per row, with gates as in GLA: logsigmoid(·) / 16."""
    x = [*inputs(shape), (F.logsigmoid(torch.randn(shape[:4])) / 16).requires_grad_()]
    unit = math.prod(shape)
    count = (7 * unit, 16 * unit) if erase else (5 * unit, 12 * unit)
    return rows(case, shape, forward_and_backward(written(x, erase=erase), x, count, ceiling, rounds))


def two_writes_race(shape: Shape, rounds: int, ceiling: float) -> list[Row]:
    """Two writes per token, compared with two calls of one write per token."""
    one, (q, *other) = inputs(shape), inputs(shape)
    x = [q, *(torch.cat([y, z], dim=1).detach().requires_grad_() for y, z in zip(one[1:], other, strict=True))]
    native = written(one)["native"]
    unit = math.prod(shape)
    measured = forward_and_backward(
        written(x), [*x, *one], (10 * unit, 24 * unit), ceiling, rounds,
        baselines={"native, one write, twice": lambda: native() + native()},
        baseline_count={"native, one write, twice": (12 * unit, 28 * unit)},
    )  # fmt: skip
    return rows("two writes per token", shape, measured)


def linear_race(shape: Shape, rounds: int, ceiling: float) -> list[Row]:
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
    full, of_full = {FULL: partial(peers.full_attention, *x)}, {FULL: (2.0 * unit * t, 5.0 * unit * t)}
    count = 4 * unit * window, 10 * unit * window
    measured = forward_and_backward(contestants, x, count, ceiling, rounds, baselines=full, baseline_count=of_full)
    return rows(f"attention, window {window}", shape, measured)


def retention_race(window: int, kept: int, shape: tuple[int, int, int, int], rounds: int, ceiling: float) -> list[Row]:
    """A short window plus entries kept by (here random) scores, their selection included; compared with a window of as
    many entries, and with full attention. Speedups are relative to that window."""
    b, t, h, d = shape
    x = [torch.randn(b, t, h, d, requires_grad=True) for _ in range(3)]
    scores, leaves = torch.randn(b, t, h), torch.arange(t).expand(b, t) + window

    def retained(expiry_backend: str | None, backend: str) -> Tensor:
        beyond = Beyond(expiry(scores, leaves, kept=kept, backend=expiry_backend), kept)
        return window_attention(*x, window=window, beyond=beyond, backend=backend)

    contestants = {"blocked": partial(retained, "chunked", "blocked"), "native": partial(retained, "native", "native")}
    baselines = {
        f"native, window {window + kept}": partial(window_attention, *x, window=window + kept, backend="native"),
        FULL: partial(peers.full_attention, *x),
    }
    unit = b * t * h * d
    count, of_full = (4 * unit * (window + kept), 10 * unit * (window + kept)), {FULL: (2.0 * unit * t, 5.0 * unit * t)}
    measured = forward_and_backward(contestants, x, count, ceiling, rounds, baselines=baselines, baseline_count=of_full)
    return rows(f"attention, window {window} + {kept} kept", shape, measured)
