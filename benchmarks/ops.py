"""The memories' reads and writes against what a CPU user has today: one table, and JSON.

    python benchmarks/ops.py [--threads 2] [--rounds 7] [--json runs/bench/ops.json] [--only delta|window]

The delta rule's peer is `torch_chunk_gated_delta_rule`, transformers' implementation without a GPU, with g = 0; window
attention's are PyTorch's fused attention over everything before, and with a band for a mask. Results are compared
before anything is timed. Contestants take turns, times are medians, and beside each stands the part of the measured
matrix product's speed that its own count of operations reaches: 6·k·v a token and head forward and 14·k·v backward
for the delta rule; 4 and 10 multiply-adds a pair and channel for attention, counted over the window.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from hqlt import native
from hqlt.ops import delta_rule, window_attention

DELTA_SHAPES = [(8, 512, 4, 64, 64), (4, 1024, 2, 50, 50), (64, 256, 4, 32, 32), (1, 2048, 8, 128, 128)]
WINDOW_SHAPES = [(1, 2048, 4, 64), (1, 8192, 4, 64)]
WINDOW = 64

Contestants = dict[str, Callable[..., Tensor]]


def gemm_flops(n: int = 1536, rounds: int = 5) -> float:
    x = torch.randn(n, n)
    return 2 * n**3 / min(seconds(lambda: x @ x) for _ in range(rounds))


def seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def peak_megabytes(work: Callable[[], object]) -> float:
    """How far the process grew during the work, by the kernel's own account; NaN where there is none to ask."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        return float("nan")

    def kilobytes(field: str) -> int:
        return int(re.search(rf"{field}:\s+(\d+)", status.read_text())[1])

    ctypes.CDLL(None).malloc_trim(0)
    reset.write_text("5")  # the high-water mark begins anew
    before = kilobytes("VmRSS")
    work()
    return (kilobytes("VmHWM") - before) / 1e3


def race(
    contestants: Contestants, inputs: list[Tensor], flops: tuple[float, float], rounds: int, gemm: float
) -> list[dict]:
    def forward(run):
        with torch.no_grad():
            return run(*inputs)

    def both(run):
        return torch.autograd.grad(run(*inputs).sum(), inputs)

    rows = {name: {"implementation": name} for name in contestants}
    for what, work, count in (("forward", forward, flops[0]), ("forward + backward", both, sum(flops))):
        check_equal({name: work(run) for name, run in contestants.items()})
        times = {name: [] for name in contestants}
        for _ in range(rounds):
            for name, run in contestants.items():
                times[name].append(seconds(lambda: work(run)))  # noqa: B023
        first = statistics.median(times[next(iter(contestants))])
        for name, run in contestants.items():
            median = statistics.median(times[name])
            rows[name][what] = {
                "ms": 1e3 * median,
                "times faster": first / median,
                "of matrix product": count / median / gemm,
                "peak MB": peak_megabytes(lambda: work(run)),  # noqa: B023
            }
    return list(rows.values())


def check_equal(results: dict[str, Tensor | tuple[Tensor, ...]]) -> None:
    (first, expected), *others = results.items()
    for name, got in others:
        for e, g in zip(*((x,) if isinstance(x, Tensor) else x for x in (expected, got)), strict=True):
            error = ((e - g).norm() / e.norm()).item()
            if not error < 1e-4:
                raise SystemExit(f"{name} differs from {first} by {error:.1e}: nothing to compare")


def delta_race(b: int, t: int, h: int, k: int, v: int, rounds: int, gemm: float) -> list[dict]:
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    q, key = (F.normalize(torch.randn(b, t, h, k), dim=-1).requires_grad_() for _ in range(2))
    value, beta = torch.randn(b, t, h, v, requires_grad=True), torch.rand(b, t, h).requires_grad_()
    no_decay = torch.zeros(b, t, h)

    def peer(q, k, v, beta):
        return torch_chunk_gated_delta_rule(q, k, v, no_decay, beta, initial_state=None, output_final_state=True)[0]

    contestants = {"transformers": peer}
    for backend in ("chunked", "native"):
        contestants[backend] = lambda *x, backend=backend: delta_rule(*x, backend=backend)[0]
    unit = b * t * h * k * v
    return race(contestants, [q, key, value, beta], (6 * unit, 14 * unit), rounds, gemm)


def window_race(b: int, t: int, h: int, d: int, rounds: int, gemm: float) -> list[dict]:
    inputs = [torch.randn(b, t, h, d, requires_grad=True) for _ in range(3)]
    age = torch.arange(t)[:, None] - torch.arange(t)
    band = (age >= 0) & (age < WINDOW)

    def heads_first(attend):
        return lambda *x: attend(*(y.transpose(1, 2) for y in x)).transpose(1, 2)

    masked = heads_first(lambda *x: F.scaled_dot_product_attention(*x, attn_mask=band))
    contestants = {"SDPA, band mask": masked}
    for backend in ("blocked", "native"):
        contestants[backend] = lambda *x, backend=backend: window_attention(*x, window=WINDOW, backend=backend)
    unit = b * t * h * d * WINDOW
    rows = race(contestants, inputs, (4 * unit, 10 * unit), rounds, gemm)
    full = {"SDPA, full causal": heads_first(lambda *x: F.scaled_dot_product_attention(*x, is_causal=True))}
    rows = race(full, inputs, (2 * unit * t / WINDOW, 5 * unit * t / WINDOW), rounds, gemm) + rows
    for row in rows:  # full attention computes something else: the measure, not a contestant to be equal to
        for what in ("forward", "forward + backward"):
            row[what]["times faster"] = rows[0][what]["ms"] / row[what]["ms"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, default=Path("runs/bench/ops.json"))
    parser.add_argument("--only", choices=["delta", "window"])
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    gemm = gemm_flops()

    results = []
    for shape in DELTA_SHAPES if options.only != "window" else []:
        for row in delta_race(*shape, options.rounds, gemm):
            results.append({"operation": "delta rule", "shape": shape, **row})
    for shape in WINDOW_SHAPES if options.only != "delta" else []:
        for row in window_race(*shape, options.rounds, gemm):
            results.append({"operation": f"attention, window {WINDOW}", "shape": shape, **row})

    setting = {
        "processor": platform.processor() or platform.machine(),
        "threads": options.threads,
        "torch": torch.__version__,
        "instruction set": native.instruction_set(),
        "matrix product GFLOP/s": round(gemm / 1e9),
    }
    table = Table(title=", ".join(f"{k} {v}" for k, v in setting.items()), caption="float32; % of the matrix product")
    for column in ("operation", "b, t, h, k(, v)", "implementation"):
        table.add_column(column)
    for column in ("forward ms", "×", "%", "MB", "fwd + bwd ms", "×", "%", "MB"):
        table.add_column(column, justify="right")
    for row in results:
        cells = []
        for what in ("forward", "forward + backward"):
            ms, faster, part, peak = row[what].values()
            cells += [f"{ms:.1f}", f"{faster:.1f}", f"{100 * part:.0f}", f"{peak:.0f}"]
        table.add_row(row["operation"], ", ".join(map(str, row["shape"])), row["implementation"], *cells)
    Console(width=140).print(table)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps({"setting": setting, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
