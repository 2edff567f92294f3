"""Comparison of contestants: results are compared before anything is timed, contestants take turns, times are
medians."""

from __future__ import annotations

import ctypes
import re
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.text import Text
from torch import Tensor

from hqlt.report.terminal import FittingTable

Work = Callable[[], Any]
Row = dict[str, Any]
"""A row of results: "case", "shape", "implementation", and for each measurement a dictionary such as {"ms", "times
faster", "of ceiling", "peak MB"}."""


def seconds(work: Work) -> float:
    """Wall-clock time; with one thread, CPU time, which other programs affect less."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    begin = clock()
    work()
    return clock() - begin


def cuda_seconds(work: Work) -> float:
    """Time between two CUDA events, on the GPU's clock."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def peak_megabytes(work: Work) -> float:
    """Growth of the process's memory during the work, as the kernel reports it; NaN if it does not."""
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return float("nan")
    ctypes.CDLL(None).malloc_trim(0)
    reset.write_text("5")  # resets the high-water mark
    before = resident_megabytes()
    work()
    return resident_megabytes("VmHWM") - before


def resident_megabytes(field: str = "VmRSS") -> float:
    """Resident memory of the process now, or its peak (VmHWM); NaN if the kernel does not report it."""
    status = Path("/proc/self/status")
    found = re.search(rf"{field}:\s+(\d+)", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 / 1e6 if found else float("nan")


def cuda_peak_megabytes(work: Work) -> float:
    """Peak of the GPU memory that PyTorch allocated during the work, minus what was allocated before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


class Meter(NamedTuple):
    """How time and memory are measured."""

    seconds: Callable[[Work], float]
    peak_megabytes: Callable[[Work], float]


CPU = Meter(seconds, peak_megabytes)
CUDA = Meter(cuda_seconds, cuda_peak_megabytes)


def matrix_product_rate(n: int = 1536, rounds: int = 5, meter: Meter = CPU, **kind: Any) -> float:
    """Floating-point operations per second of a large matrix product: the ceiling of compute-bound work.

    kind: dtype and device of the matrices, float32 on the CPU by default.
    """
    x = torch.randn(n, n, **kind)
    return 2 * n**3 / max(min(meter.seconds(lambda: x @ x) for _ in range(rounds)), 1e-9)


def copy_rate(numbers: int = 2**24, rounds: int = 5, meter: Meter = CPU, **kind: Any) -> float:
    """Bytes read and written per second when copying more than any cache holds: the ceiling of memory-bound work."""
    x, y = torch.randn(numbers, **kind), torch.empty(numbers, **kind)
    return 2 * x.nbytes / max(min(meter.seconds(lambda: y.copy_(x)) for _ in range(rounds)), 1e-9)


def check_equal(results: dict[str, Any], tolerance: float = 1e-4) -> None:
    """Exit if the contestants' results differ. Each result is a tensor or several tensors."""
    (first, expected), *others = results.items()
    for name, got in others:
        for e, g in zip(_tensors(expected), _tensors(got), strict=True):
            error = ((e - g).norm() / e.norm().clamp_min(1e-30)).item()
            if not error < tolerance:
                raise SystemExit(f"{name} differs from {first} by {error:.1e}; their times are not comparable")


def _tensors(x: Tensor | Iterable[Tensor | None]) -> list[Tensor]:
    return [x] if isinstance(x, Tensor) else [y for y in x if y is not None]


def race(
    contestants: Mapping[str, Work], count: dict[str, float] | float, ceiling: float, rounds: int, meter: Meter = CPU
) -> dict[str, Row]:
    """Time the contestants in turns.

    Args:
        contestants: The work of each, by name.
        count: Number of operations (or bytes), by name or the same for all.
        ceiling: Possible operations (or bytes) per second.
        rounds: Number of measurements of each.
        meter: How time and memory are measured.

    Returns:
        For each name, the median time, the speedup over the first contestant, the share of the ceiling reached, and the
        peak memory.
    """
    for work in contestants.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, work in contestants.items():
            times[name].append(meter.seconds(work))
    median = {name: statistics.median(measured) for name, measured in times.items()}
    first = median[next(iter(contestants))]
    return {
        name: {
            "ms": 1e3 * median[name],
            "times faster": first / median[name],
            "of ceiling": (count[name] if isinstance(count, dict) else count) / median[name] / ceiling,
            "peak MB": meter.peak_megabytes(work),
        }
        for name, work in contestants.items()
    }


def rows(case: str, shape: tuple[int, ...], measured: dict[str, dict[str, Row]]) -> list[Row]:
    """One row per implementation. measured: the results of `race`, by what was measured."""
    names = next(iter(measured.values()))
    return [
        {"case": case, "shape": shape, "implementation": name} | {what: each[name] for what, each in measured.items()}
        for name in names
    ]


def forward_and_backward(
    contestants: Mapping[str, Callable[[], Tensor]],
    leaves: list[Tensor],
    count: tuple[float, float],
    ceiling: float,
    rounds: int,
    meter: Meter = CPU,
    tolerance: float = 1e-3,
    baselines: Mapping[str, Callable[[], Tensor]] | None = None,
    baseline_count: Mapping[str, tuple[float, float]] | None = None,
) -> dict[str, dict[str, Row]]:
    """Time the forward pass without gradients, and forward plus backward for a fixed random gradient of the output.

    Args:
        contestants: Functions that return the output, by name.
        leaves: Tensors to differentiate with respect to; a contestant may use only some of them.
        count: Operations of the forward and of the backward pass.
        ceiling: Possible operations per second.
        rounds: Number of measurements of each.
        meter: How time and memory are measured.
        tolerance: Accepted relative difference between results.
        baselines: Functions that compute something else, timed for comparison but not checked for equality.
        baseline_count: Operations of those baselines whose count differs.
    """
    baselines = baselines or {}
    with torch.no_grad():
        direction = torch.randn_like(next(iter(contestants.values()))())

    def forward(run: Callable[[], Tensor]) -> Work:
        return torch.no_grad()(run)

    def both(run: Callable[[], Tensor]) -> Work:
        return lambda: torch.autograd.grad(run(), leaves, direction, allow_unused=True)

    measured = {}
    for what, prepare, total_of in (("forward", forward, lambda n: n[0]), ("forward + backward", both, sum)):
        works = {name: prepare(run) for name, run in contestants.items()}
        check_equal({name: work() for name, work in works.items()}, tolerance)
        works = {name: prepare(run) for name, run in baselines.items()} | works
        total = {name: float(total_of((baseline_count or {}).get(name, count))) for name in works}
        measured[what] = race(works, total, ceiling, rounds, meter)
    return measured


FIGURES = {
    "ms": ("ms", 1, ".3g"), "times faster": ("×", 1, ".2f"), "of ceiling": ("%", 100, ".0f"),
    "peak MB": ("MB", 1, ".0f"), "of projections": ("of projections", 1, ".3f"), "steps/s": ("steps/s", 1, ".2f"),
    "share": ("%", 100, ".0f"), "tokens/s": ("tokens/s", 1, ",.0f"), "MB": ("MB", 1, ",.1f"),
    "ratio": ("ratio", 1, ".3g"), "aim": ("aim", 1, ""),
    **{rate: (rate, 1, ",.0f") for rate in ("median", "slowest", "fastest")},
}  # fmt: skip
"""For each measured quantity, its heading, factor and number format in a table."""


def table_of(title: str, results: list[Row], caption: str) -> FittingTable:
    """A table with one line per row of results."""
    names = [name for name in ("case", "shape", "implementation") if name in results[0]]
    columns: list[str] = [*names]
    rows = [[Text(str(row[name]).strip("(,)")) for name in names] for row in results]
    for what in (name for name, value in results[0].items() if isinstance(value, dict)):
        measured = [row.get(what, {}) for row in results]
        present = [figure for figure in FIGURES if any(figure in values for values in measured)]
        for figure in present:
            heading, factor, form = FIGURES[figure]
            columns.append(f"{what} {heading}" if figure == present[0] else heading)
            for row, values in zip(rows, measured, strict=True):
                row.append(Text(format(factor * values[figure], form) if figure in values else ""))
    return FittingTable(columns, rows, caption, title, names=len(names))
