"""One whole layer, forward and backward, with native, chunked and peer implementations of its memories.

The layer's own operations are counted: 10·d² per token for the projections, and the memories' as in `hqlt.bench.ops`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor

from hqlt import HybridMemory
from hqlt.bench import peers
from hqlt.bench.race import Row, forward_and_backward, matrix_product_rate, rows

SHAPES = {"340m": (1, 2048, 1024, 8), "tiny": (8, 512, 192, 6)}
ONLY = tuple(SHAPES)


def run(rounds: int, quick: bool, only: str | None) -> list[Row]:
    ceiling = matrix_product_rate(256 if quick else 1536)
    shapes = {"tiny": (1, 70, 16, 2)} if quick else SHAPES
    chosen = {name: shape for name, shape in shapes.items() if only in (None, name)}
    return [row for case in chosen.items() for row in layer_race(*case, 8 if quick else 64, rounds, ceiling)]


def layer_race(name: str, shape: tuple[int, int, int, int], window: int, rounds: int, ceiling: float) -> list[Row]:
    b, t, d, h = shape
    layer = HybridMemory(d, h, window)
    x = torch.randn(b, t, d, requires_grad=True)

    def forward(memories: Callable[[], AbstractContextManager[None]]) -> Tensor:
        with memories():
            y: Tensor = layer(x)[0]
        return y

    contestants = {name: partial(forward, memories) for name, memories in peers.MEMORIES.items()}
    tokens, k = b * t, d // h
    count = tokens * d * (10 * d + 6 * k + 4 * window), tokens * d * (20 * d + 14 * k + 10 * window)
    leaves = [x, *layer.parameters()]
    return rows(f"layer, {name}", shape, forward_and_backward(contestants, leaves, count, ceiling, rounds))
