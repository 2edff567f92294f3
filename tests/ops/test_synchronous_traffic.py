"""Memory traffic of the kernels of a synchronous layer, address by address, recorded in Triton's interpreter.

The interpreter runs one program after the other, so data races do not affect its results. The addresses reveal them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch

from hqlt.ops import synchronous
from tests.ops.test_synchronous import INTERPRETED, NO_TRITON, beyond_of, inputs_of, resets_of

pytestmark = pytest.mark.skipif(bool(NO_TRITON) or not INTERPRETED, reason=NO_TRITON or "needs the interpreter")

CACHE_LINE = 32


class Traffic:
    """The memory that the programs of one launch load and store, in granules of this many bytes."""

    def __init__(self, kernel: str, granule: int) -> None:
        self.kernel, self.granule = kernel, granule
        self.read: set[int] = set()
        self.written: dict[int, tuple[int, int]] = {}  # program, and number of barriers before
        self.barriers = 0
        self.conflicts: list[str] = []

    def parts(self, addresses: Any, mask: Any) -> list[int]:
        there, mask = torch.from_numpy(addresses.astype("int64")), torch.from_numpy(mask.astype(bool))
        return (there[mask] // self.granule).unique().tolist()

    def load(self, program: int, addresses: Any, mask: Any) -> None:
        for part in self.parts(addresses, mask):
            if part not in self.written:
                self.read.add(part)
            elif self.written[part][0] != program:
                self.conflicts.append(f"{self.kernel}: program {program} loads what {self.written[part][0]} stores")
            elif self.written[part][1] == self.barriers:
                self.conflicts.append(f"{self.kernel}: {program} loads what it has stored, with no barrier between")

    def store(self, program: int, addresses: Any, mask: Any) -> None:
        for part in self.parts(addresses, mask):
            if self.written.get(part, (program,))[0] != program:
                self.conflicts.append(f"{self.kernel}: {program} stores where {self.written[part][0]} has stored")
            self.written[part] = program, self.barriers


@contextlib.contextmanager
def watched(granule: int) -> Iterator[list[Traffic]]:
    """Context manager that records the traffic of every launch of an interpreted kernel."""
    from triton.runtime.interpreter import InterpreterBuilder

    from hqlt.ops.synchronous.kernels import launch

    launches: list[Traffic] = []
    original = {
        name: getattr(InterpreterBuilder, f"create_{name}") for name in ("masked_load", "masked_store", "barrier")
    }
    begin = launch.launch

    def launched(kernel: Any, *others: Any) -> None:
        launches.append(Traffic(kernel.fn.__name__, granule))
        begin(kernel, *others)

    def load(self: Any, pointers: Any, mask: Any, *others: Any) -> Any:
        launches[-1].load(self.grid_idx[0], pointers.data, mask.data)
        return original["masked_load"](self, pointers, mask, *others)

    def store(self: Any, pointers: Any, value: Any, mask: Any, *others: Any) -> Any:
        launches[-1].store(self.grid_idx[0], pointers.data, mask.data)
        return original["masked_store"](self, pointers, value, mask, *others)

    def barrier(self: Any) -> Any:
        launches[-1].barriers += 1
        return original["barrier"](self)

    changed = {"create_masked_load": load, "create_masked_store": store, "create_barrier": barrier}
    with mock.patch.object(launch, "launch", launched), mock.patch.multiple(InterpreterBuilder, **changed):
        yield launches


def forward_and_backward(
    inputs: list[torch.Tensor], window: int, resets: torch.Tensor | None = None, kept: int = 0
) -> None:
    beyond = beyond_of(inputs, window, resets, kept) if kept else None
    wanted = [x.detach().requires_grad_() for x in inputs]
    *inputs, state, decay = [*wanted, None][:8]
    y, W = synchronous(*inputs, state=state, decay=decay, window=window, resets=resets, beyond=beyond, backend="triton")
    torch.autograd.grad([y, W], wanted, [torch.ones_like(y), torch.ones_like(W)])


UNITS = {
    "prepare": (2, 3.5),
    "carry": (3, 3),
    "read": (8, 1),
    "queries_backward": (9, 5),
    "carry_backward": (5, 3),
    "entries_backward": (12.5, 2),
}
"""Reads and writes of each kernel, in units of one tensor [b, t, h, 128] in the inputs' dtype; the table of
docs/gpu.md."""


@pytest.mark.parametrize(("decays", "most"), [(False, 57.3), (True, 57.5)])
def test_forward_and_backward_move_57_units(decays, most):
    """Each granule of memory counts once per launch. Reads of granules that the launch has written come from the cache
    and do not count. The difference between two lengths is counted, which excludes what is read once per call.
    """
    heads, sizes = 2, (128, 192)
    moved = []
    for t in sizes:
        with watched(CACHE_LINE) as launches:
            inputs = inputs_of(1, t, key=128, value=128, dtype=torch.float16, heads=heads, decays=decays)
            forward_and_backward(inputs, window=64)
        moved.append({traffic.kernel: (len(traffic.read), len(traffic.written)) for traffic in launches})
    unit = (sizes[1] - sizes[0]) * heads * 128 * torch.float16.itemsize / CACHE_LINE
    few, many = moved
    units = {name: [(y - x) / unit for x, y in zip(few[name], many[name], strict=True)] for name in many}
    assert list(units) == list(UNITS)
    for name, counted in units.items():
        for got, expected in zip(counted, UNITS[name], strict=True):
            assert expected <= got < expected + 0.1, f"{name}: {counted}"  # β, segments, denominators, slopes
    assert 57 <= sum(map(sum, units.values())) < most


@pytest.mark.parametrize(("decays", "kept"), [(False, 0), (True, 0), (False, 20)])
def test_programs_do_not_race(decays, kept):
    """No program loads or stores what another program of the same launch stores, and it loads what it has stored itself
    only after a barrier. Results therefore do not depend on the order of programs or threads."""
    with watched(1) as launches:
        forward_and_backward(inputs_of(2, 35, held=5, key=8, value=20, decays=decays), 9, resets_of(2, 40), kept)
    assert len(launches) == (8 if kept else 6)
    assert [conflict for of in launches for conflict in of.conflicts] == []
