"""How the kernels of `hqlt.ops.synchronous` are launched best: warps, stages and blocks of each, checked and timed.

One entry of the tables of `hqlt.ops.synchronous.kernels.launch` is exchanged at a time. The whole operation then runs
forward and backward and is compared with the table as it stands; the one kernel is timed by itself, on what it was
launched with.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple
from unittest import mock

import torch

from hqlt.bench.gpu import Place
from hqlt.bench.gpu_compile import Launched, Shape, launches_of, recorded, warm_up
from hqlt.bench.gpu_right import NAMES, TOLERANCE, answers, errors, inputs_of
from hqlt.errors import first_line
from hqlt.ops.synchronous.kernels import launch
from hqlt.ops.synchronous.kernels.launch import Launch

BLOCKED = ("carry", "carry_backward", "key_backward")
"""Kernels whose `block` is a choice."""
LAUNCHES = 20
"""Of a kernel between two looks at the clock."""


class Candidate(NamedTuple):
    """A kernel, and how to launch it."""

    kernel: str
    how: Launch


def candidates(table: launch.Table, quick: bool) -> Iterator[Candidate]:
    """The table's own launch of each kernel first, then all others."""
    for kernel, how in table.items():
        if kernel == "step":
            continue
        blocks = (16, 32, 64) if kernel in BLOCKED else (how.block,)
        others = [Launch(*of) for of in product((4, 8), (1, 2, 3), blocks)]
        if quick:
            others = [how._replace(block=16)] if kernel in BLOCKED else []
        yield from (Candidate(kernel, of) for of in dict.fromkeys([how, *others]))


def run(place: Place, shape: Shape, rounds: int, quick: bool = False) -> list[dict[str, Any]]:
    table = launch.table_for(shape.k, shape.v)
    every = list(candidates(table, quick))
    if place.device == "cuda":
        _compile_ahead(shape, place.dtype, table, every)
    given = inputs_of(shape, place.dtype, place.device)
    resets = torch.zeros(shape.b, shape.held + shape.t, dtype=torch.bool, device=place.device)
    expected = answers(given, shape, resets, "triton")
    results = []
    for kernel, how in every:
        row: dict[str, Any] = {"kernel": kernel, **how._asdict(), "in use": table[kernel] == how}
        try:
            with mock.patch.dict(table, {kernel: how}), recorded(launch.launch) as launches:
                off = errors(answers(given, shape, resets, "triton"), expected)
            call = next(call for call in launches if call.name == kernel)
            row |= {"ms": _milliseconds(call, place, rounds), "errors": off}
            row["right"] = all(off[name] < TOLERANCE[place.dtype] for name in NAMES)
        except Exception as error:  # such as more shared memory than there is
            row |= {"ms": float("nan"), "right": False, "failed": f"{type(error).__name__}: {first_line(error)}"[:300]}
        print(row_of(row), flush=True)
        results.append(row)
    return results


def row_of(row: dict[str, Any]) -> str:
    marks = ("*" if row["in use"] else " ") + (" " if row["right"] else " WRONG ")
    how = f"warps {row['warps']} stages {row['stages']} block {row['block']}"
    return f"{row['kernel']:15} {how:30} {row['ms']:8.3f} ms {marks} {row.get('failed', '')}"


def _compile_ahead(shape: Shape, dtype: torch.dtype, table: launch.Table, every: list[Candidate]) -> None:
    """All at once on all processors: one after the other would take minutes."""
    calls: list[Launched] = []
    for kernel, how in every:
        with mock.patch.dict(table, {kernel: how}):
            calls += [call for call in launches_of(shape, dtype) if call.name == kernel]
    warm_up(calls)


def _milliseconds(call: Launched, place: Place, rounds: int) -> float:
    """Of one launch. Kernels that add to what is there add again: the time is the same."""

    def work() -> None:
        for _ in range(LAUNCHES if place.device == "cuda" else 1):
            launch.launch(*call)

    work()
    times = sorted(place.meter.seconds(work) for _ in range(rounds))
    return 1e3 * times[len(times) // 2] / LAUNCHES
