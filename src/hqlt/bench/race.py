"""A race: contestants take turns, times are medians, results are compared before anything is timed."""

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
"""{"case", "shape", "implementation", and for each thing measured {"ms", "times faster", "of ceiling", "peak MB"}}"""


def seconds(work: Work) -> float:
    """Time that has passed; with one thread the processor's, in which other programs count less."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    begin = clock()
    work()
    return clock() - begin


def cuda_seconds(work: Work) -> float:
    """Time between two events on the GPU's own clock."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def peak_megabytes(work: Work) -> float:
    """How far the process grew during the work, by the kernel's own account; NaN where there is none to ask."""
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return float("nan")
    ctypes.CDLL(None).malloc_trim(0)
    reset.write_text("5")  # the high-water mark begins anew
    before = resident_megabytes()
    work()
    return resident_megabytes("VmHWM") - before


def resident_megabytes(field: str = "VmRSS") -> float:
    """What the process has in memory now, or had at most (VmHWM); NaN where the kernel does not tell."""
    status = Path("/proc/self/status")
    found = re.search(rf"{field}:\s+(\d+)", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 / 1e6 if found else float("nan")


def cuda_peak_megabytes(work: Work) -> float:
    """How much more memory than before PyTorch gave out on the GPU during the work, at its highest."""
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
    """Floating-point operations a second of a large product of matrices: the ceiling of what computes.

    kind: the matrices' dtype and device, where not float32 on a CPU.
    """
    x = torch.randn(n, n, **kind)
    return 2 * n**3 / max(min(meter.seconds(lambda: x @ x) for _ in range(rounds)), 1e-9)


def copy_rate(numbers: int = 2**24, rounds: int = 5, meter: Meter = CPU, **kind: Any) -> float:
    """Bytes a second, read and written, of copying more than any cache holds: the ceiling of what only moves."""
    x, y = torch.randn(numbers, **kind), torch.empty(numbers, **kind)
    return 2 * x.nbytes / max(min(meter.seconds(lambda: y.copy_(x)) for _ in range(rounds)), 1e-9)


def check_equal(results: dict[str, Any], tolerance: float = 1e-4) -> None:
    """Refuse to compare contestants that compute different things. Each result: a tensor or some of them."""
    (first, expected), *others = results.items()
    for name, got in others:
        for e, g in zip(_tensors(expected), _tensors(got), strict=True):
            error = ((e - g).norm() / e.norm().clamp_min(1e-30)).item()
            if not error < tolerance:
                raise SystemExit(f"{name} differs from {first} by {error:.1e}: nothing to compare")


def _tensors(x: Tensor | Iterable[Tensor | None]) -> list[Tensor]:
    return [x] if isinstance(x, Tensor) else [y for y in x if y is not None]


def race(
    contestants: Mapping[str, Work], count: dict[str, float] | float, ceiling: float, rounds: int, meter: Meter = CPU
) -> dict[str, Row]:
    """Time them in turns. count: operations (or bytes) of each, or of all; ceiling: how many of them a second.

    → by name: ms, how many times faster than the first contestant, part of the ceiling reached, peak memory.
    """
    for work in contestants.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, work in contestants.items():
            times[name].append(meter.seconds(work))
    median = {name: statistics.median(of) for name, of in times.items()}
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
    """One row an implementation, from {what was measured: race's answer}."""
    names = next(iter(measured.values()))
    return [
        {"case": case, "shape": shape, "implementation": name} | {what: of[name] for what, of in measured.items()}
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
    beside: Mapping[str, Callable[[], Tensor]] | None = None,
    its_count: Mapping[str, tuple[float, float]] | None = None,
) -> dict[str, dict[str, Row]]:
    """Both directions: without gradients, and with those of a fixed random direction. count: forward, backward.

    leaves: all that a gradient is asked of, by some of them or by all. beside: what computes something else, and is a
    measure beside the contestants, not one to be equal to; its_count: where that is another.
    """
    beside = beside or {}
    with torch.no_grad():
        direction = torch.randn_like(next(iter(contestants.values()))())

    def forward(run: Callable[[], Tensor]) -> Work:
        return torch.no_grad()(run)

    def both(run: Callable[[], Tensor]) -> Work:
        return lambda: torch.autograd.grad(run(), leaves, direction, allow_unused=True)

    measured = {}
    for what, prepare, of in (("forward", forward, lambda n: n[0]), ("forward + backward", both, sum)):
        works = {name: prepare(run) for name, run in contestants.items()}
        check_equal({name: work() for name, work in works.items()}, tolerance)
        works = {name: prepare(run) for name, run in beside.items()} | works
        total = {name: float(of((its_count or {}).get(name, count))) for name in works}
        measured[what] = race(works, total, ceiling, rounds, meter)
    return measured


FIGURES = {
    "ms": ("ms", 1, ".3g"), "times faster": ("×", 1, ".2f"), "of ceiling": ("%", 100, ".0f"),
    "peak MB": ("MB", 1, ".0f"), "of projections": ("of projections", 1, ".3f"), "steps/s": ("steps/s", 1, ".2f"),
    "share": ("%", 100, ".0f"), "tokens/s": ("tokens/s", 1, ",.0f"), "MB": ("MB", 1, ",.1f"),
    "ratio": ("ratio", 1, ".3g"), "aim": ("aim", 1, ""),
    **{rate: (rate, 1, ",.0f") for rate in ("median", "slowest", "fastest")},
}  # fmt: skip
"""What is measured: its heading, its factor and its format in a table."""


def table_of(title: str, results: list[Row], caption: str) -> FittingTable:
    names = [name for name in ("case", "shape", "implementation") if name in results[0]]
    columns: list[str] = [*names]
    rows = [[Text(str(row[name]).strip("(,)")) for name in names] for row in results]
    for what in (name for name, value in results[0].items() if isinstance(value, dict)):
        measured = [row.get(what, {}) for row in results]
        there = [figure for figure in FIGURES if any(figure in of for of in measured)]
        for figure in there:
            heading, factor, form = FIGURES[figure]
            columns.append(f"{what} {heading}" if figure == there[0] else heading)
            for row, of in zip(rows, measured, strict=True):
                row.append(Text(format(factor * of[figure], form) if figure in of else ""))
    return FittingTable(columns, rows, caption, title, names=len(names))
