"""One token through one layer at batch 1 with a state: the memories, compared with the projections and with a KV cache.

All of this is memory-bound, so the ceiling is the copy rate: the projections read their weights, the memories read
their state and write a new one (states are not modified in place), and full attention reads its cache. The state after
a million tokens is one after a thousand tokens with its position changed, because its size does not grow.

A layer that keeps entries beyond a short window is compared with one whose window is as long as both together.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from hqlt import HybridMemory, ops
from hqlt.bench.race import Row, Work, check_equal, copy_rate, race, rows
from hqlt.memory import MemoryState
from hqlt.memory.state import leaves

ONLY = ("synchronous", "delayed-streaming", "delayed-chunk", "retention", "full attention")


@torch.no_grad()
def run(rounds: int, quick: bool, only: str | None) -> list[Row]:
    ceiling = copy_rate(2**16 if quick else 2**24)
    d, h, window, rounds = (16, 2, 8, rounds) if quick else (1024, 8, 64, 20 * rounds)
    results: list[Row] = []
    for blend in ONLY[:3]:
        if only in (None, blend):
            results += blend_race(HybridMemory(d, h, window, blend), d, h, rounds, ceiling)
    if only in (None, "retention"):
        for b in [1] if quick else [1, 8]:
            results += retention_race((b, 1, d, h) if quick else (b, 1, 256, 4), window, rounds, ceiling)
    for context in [100] if quick else [1_000, 8_000, 64_000]:
        if only in (None, "full attention"):
            results += cache_race(context, d, h, rounds, ceiling)
    return results


def blend_race(layer: HybridMemory, d: int, h: int, rounds: int, ceiling: float) -> list[Row]:
    x = torch.randn(1, 1, d)
    young = layer(torch.randn(1, 1_000, d))[1]
    old = young._replace(position=torch.full_like(young.position, 1_000_000))
    projected, _ = layer.project(x, young, None)
    moved, copy = 2.0 * young.bytes_per_row(), young.clone()

    def memories() -> tuple[Tensor, MemoryState]:
        return layer.read_memories(projected, young, None)

    def composed() -> tuple[Tensor, MemoryState]:
        with ops.use_backend("native"):
            return memories()

    def projections() -> None:
        for linear in (layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj, getattr(layer.mixer, "gate_proj", None)):
            if linear is not None:
                linear(x)

    def copied() -> None:
        for target, source in zip(copy.leaves(), young.leaves(), strict=True):
            target.copy_(source)

    def numbers(out: Tensor, after: MemoryState) -> list[Tensor]:
        return [out, *leaves((after.kv, after.fw))]

    with ops.use_backend("reference"):
        expected = numbers(*memories())
    for run in (memories, composed):
        check_equal({"reference": expected, "native": numbers(*run())})
    works: dict[str, Work] = {
        "projections": projections,
        "both memories, mixer and norm, native step": memories,
        "both memories, mixer and norm, operation by operation": composed,
        "a copy of the state": copied,
        "whole layer, context 1,000": lambda: layer(x, young),
        "whole layer, context 1,000,000": lambda: layer(x, old),
    }
    weights = 5.0 * 4 * d * d
    count = {name: weights + moved if "layer" in name else moved for name in works} | {"projections": weights}
    name = next(name for name in ONLY if type(layer.blend).__name__.lower() == name.replace("-", ""))
    results = rows(name, (1, 1, d, h), {"one token": race(works, count, ceiling, rounds)})
    for row in results:
        row["one token"]["of projections"] = row["one token"]["ms"] / results[0]["one token"]["ms"]
    return results


def retention_race(shape: tuple[int, int, int, int], window: int, rounds: int, ceiling: float) -> list[Row]:
    """Whole layers that see equally many entries. (They compute different things.)"""
    (b, t, d, h), short = shape, window // 4
    layers = {
        f"window {window}": HybridMemory(d, h, window),
        f"window {short} and {window - short} kept": HybridMemory(
            d, h, short, retention="surprise", kept=window - short
        ),
    }
    x = torch.randn(b, t, d)
    works: dict[str, Work] = {}
    count: dict[str, float] = {}
    for name, layer in layers.items():
        state = layer(torch.randn(b, 1_000, d))[1]
        works[name] = partial(layer, x, state)
        count[name] = 5.0 * 4 * d * d + 2.0 * b * state.bytes_per_row()
    return rows("entries beyond the window", shape, {"one token": race(works, count, ceiling, rounds)})


def cache_race(context: int, d: int, h: int, rounds: int, ceiling: float) -> list[Row]:
    q, (k, v) = torch.randn(1, h, 1, d // h), torch.randn(2, 1, h, context, d // h)
    works: dict[str, Work] = {"SDPA over a cache": lambda: F.scaled_dot_product_attention(q, k, v)}
    measured = race(works, 8.0 * context * d, ceiling, max(rounds // 4, 1))
    return rows(f"full attention, context {context:,}", (1, 1, d, h), {"one token": measured})
