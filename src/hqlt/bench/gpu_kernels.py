"""The kernels of `hqlt.ops.synchronous` on a GPU: whether they are right, and how they are launched best.

The launches of a call are recorded, on tensors without memory where nothing is to run: so kernels are compiled ahead,
on all processors at once, and one of them is timed by itself.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import product
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor

from hqlt.bench.gpu import Place
from hqlt.errors import first_line
from hqlt.memory.rotary import Rotary
from hqlt.ops import synchronous
from hqlt.ops.synchronous.kernels import launch, operators
from hqlt.ops.synchronous.kernels.launch import Launch
from hqlt.shapes import at_least_float32

NAMES = ("y", "W", "dq", "dk", "dv", "dβ", "dgate", "dnorm", "dW", "dlogα")
TOLERANCE = {torch.bfloat16: 5e-2, torch.float16: 6e-3, torch.float32: 3e-6, torch.float64: 1e-12}
"""Of outputs and gradients, as a part of their norm, against the reference in float64 on the same numbers."""
BLOCKED = ("carry", "carry_backward", "entries_backward")
"""Kernels whose `block` is a choice."""
LAUNCHES = 20
"""Of a kernel between two looks at the clock."""


class Shape(NamedTuple):
    """Of a call: rows, tokens, heads, widths; KV entries from before, the window, and whether the matrix decays."""

    b: int
    t: int
    h: int
    k: int
    v: int
    held: int = 0
    window: int = 64
    decays: bool = False


SHAPES = (
    Shape(1, 1, 1, 4, 3, held=7, window=8),
    Shape(3, 65, 2, 18, 33, held=1, window=64),
    Shape(2, 131, 2, 64, 64, held=9, window=10),
    Shape(2, 330, 2, 128, 128, held=63, window=64),
    Shape(2, 256, 3, 128, 64, held=0, window=256),
    Shape(2, 131, 2, 64, 64, held=9, window=10, decays=True),
    Shape(2, 330, 2, 128, 128, held=63, window=64, decays=True),
)
TINY = Shape(1, 35, 1, 4, 3, held=2, window=3, decays=True)


class Launched(NamedTuple):
    """One call of `hqlt.ops.synchronous.kernels.launch.launch`."""

    kernel: Any
    programs: int
    tensors: tuple[Tensor | None, ...]
    constants: dict[str, Any]
    how: Launch

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    def warm_up(self) -> Any:
        """→ the compiled kernel."""
        how = self.how
        return self.kernel.warmup(
            *self.tensors, **self.constants, grid=(self.programs,), num_warps=how.warps, num_stages=how.stages
        )


@contextlib.contextmanager
def recorded(then: Callable[..., None] = lambda *_: None) -> Iterator[list[Launched]]:
    """Within this context launches are noted and given to `then`: to nobody, or to the `launch` that runs them."""
    launches: list[Launched] = []

    def note(*call: Any) -> None:
        launches.append(Launched(*call))
        then(*call)

    with mock.patch.object(launch, "launch", note):
        yield launches


def launches_of(shape: Shape, dtype: torch.dtype, resets: bool = True) -> list[Launched]:
    """Everything that forward, backward and a call of one token launch."""
    b, t, h, k, v, held, window, decays = shape
    l, wide = held + t, at_least_float32(dtype)

    def of(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(*size, dtype=dtype, device="meta")

    q, key, value, gate, weight = of(b, t, h, k), of(b, l, h, k), of(b, l, h, v), of(b, t, h, v), of(v)
    beta, matrix, table = of(b, t, h, dtype=wide), of(b, h, k, v, dtype=wide), of(l, 1, k // 2, dtype=wide)
    marks, position = of(b, l, dtype=torch.bool) if resets else None, of(b, dtype=torch.long)
    decay = of(b, t, h, dtype=wide) if decays else None
    inputs = q, key, value, beta, gate, weight, matrix, decay, table, table, marks
    new_q, new_k, new_v, new_beta, new_gate = (x[:, :1] for x in (q, key, value, beta, gate))
    new_decay = None if decay is None else decay[:, :1]
    scale, norm_eps = k**-0.5, 1e-6
    with recorded() as launches:
        _, _, *kept = operators.run_forward(*inputs, window, scale, norm_eps)
        given: tuple[Any, ...] = *inputs[:6], *inputs[7:], *kept, gate, matrix, window, scale, norm_eps
        operators.run_backward(*given)
        operators.run_one_token(
            new_q, new_k, new_v, new_beta, new_gate, weight, new_decay, table, table, None,
            of(b, window - 1, h, k), of(b, window - 1, h, v), matrix, position, scale, norm_eps,
        )  # fmt: skip
    return list({call.name: call for call in launches}.values())


def warm_up(launches: list[Launched]) -> list[Future[Any]]:
    """Compile on all processors at once. What does not compile says why in its result, and when it is launched."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [pool.submit(call.warm_up) for call in launches]


def inputs_of(shape: Shape, dtype: torch.dtype, device: str) -> list[Tensor]:
    """q, k, v, β, gate, norm weight, W_0, and if it decays log α: the same numbers in every type, up to rounding."""
    b, t, h, k, v, held, _, decays = shape
    random, wide = torch.Generator().manual_seed(0), at_least_float32(dtype)

    def normal(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*size, generator=random, dtype=torch.float64).to(device, dtype)

    q, key, value = normal(b, t, h, k), normal(b, held + t, h, k), normal(b, held + t, h, v)
    beta = (2 * normal(b, t, h, dtype=torch.float64).sigmoid()).to(wide)
    given = [q, key, value, beta, normal(b, t, h, v), 1 + 0.3 * normal(v), normal(b, h, k, v, dtype=wide)]
    return [*given, -0.1 * normal(b, t, h, dtype=wide).exp()] if decays else given


def answers(given: list[Tensor], shape: Shape, resets: Tensor, backend: str = "triton") -> list[Tensor]:
    """Outputs, final matrix, and all gradients of a fixed direction."""
    wanted = [x.detach().requires_grad_() for x in given]
    *inputs, state = wanted[:7]
    decay = wanted[7] if shape.decays else None
    device, wide = given[0].device, at_least_float32(given[0].dtype)
    rotary = None if shape.k % 2 else Rotary(1e4).table(shape.held + shape.t, shape.k, device, wide)
    options: dict[str, Any] = {
        "window": shape.window,
        "rotary": rotary,
        "state": state,
        "decay": decay,
        "resets": resets,
        "backend": backend,
    }
    out = synchronous(*inputs, **options)
    random = torch.Generator().manual_seed(1)
    directions = [torch.randn(x.shape, generator=random, dtype=torch.float64).to(x) for x in out]
    return [x.detach() for x in (*out, *torch.autograd.grad(out, wanted, directions))]


def errors(got: list[Tensor], expected: list[Tensor]) -> dict[str, float]:
    """‖got − expected‖ / ‖expected‖ of each, by name."""
    return {
        name: ((mine.double() - theirs.double()).norm() / theirs.double().norm().clamp_min(1e-6)).item()
        for name, mine, theirs in zip(NAMES[: len(got)], got, expected, strict=True)
    }


def compare(shape: Shape, dtype: torch.dtype, device: str, again: int) -> dict[str, Any]:
    """Ours against the reference, and against itself `again` times: what threads race for changes from run to run."""
    given = inputs_of(shape, dtype, device)
    random = torch.Generator().manual_seed(2)
    resets = (torch.rand(shape.b, shape.held + shape.t, generator=random) < 0.02).to(device)
    got = answers(given, shape, resets)
    repeated = [answers(given, shape, resets) for _ in range(again)]
    off = errors(got, answers([x.double() for x in given], shape, resets, "reference"))
    same = all(torch.equal(mine, theirs) for other in repeated for mine, theirs in zip(got, other, strict=True))
    return {"errors": off, "same again": same, "right": same and max(off.values()) < TOLERANCE[dtype]}


def check(place: Place, again: int = 3) -> list[dict[str, Any]]:
    """Every type and shape; what does not run is in the answer with its reason."""
    if place.device == "cpu":  # interpreted: without bfloat16, whose products are wrong there
        cases = [(TINY, dtype) for dtype in (torch.float64, torch.float32, torch.float16)]
    else:  # wide heads in the types that they are for
        cases = [(shape, dtype) for dtype in TOLERANCE for shape in SHAPES if shape.k <= 64 or dtype.itemsize == 2]
        warm_up([call for case in cases for call in launches_of(*case)])
    results = []
    for shape, dtype in cases:
        row = {"dtype": str(dtype).removeprefix("torch."), "shape": shape._asdict()}
        results.append(row | attempt(partial(compare, shape, dtype, place.device, again)))
        print(*results[-1].values(), flush=True)
    return results


def attempt(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Its answer; where it fails, the reason."""
    try:
        return work()
    except Exception as error:  # such as more shared memory than there is
        return {"right": False, "failed": f"{type(error).__name__}: {first_line(error)}"[:300]}


def candidates(table: launch.Table, quick: bool) -> list[tuple[str, Launch]]:
    """A kernel and how to launch it: the table's own launch of each first, then all others."""
    every = []
    for kernel, how in table.items():
        blocks = (16, 32, 64) if kernel in BLOCKED else (how.block,)
        others = [Launch(*of) for of in product((4, 8), (1, 2, 3), blocks)]
        if quick:
            others = [how._replace(block=16)] if kernel in BLOCKED else []
        every += [(kernel, of) for of in dict.fromkeys([how, *others]) if kernel != "step"]
    return every


def sweep(place: Place, shape: Shape, rounds: int, quick: bool = False) -> list[dict[str, Any]]:
    """One entry of the table of launches is exchanged at a time: the whole operation is compared with the table as it
    stands, forward and backward; the one kernel is timed by itself, on what it was launched with."""
    table = launch.table_for(shape.k, shape.v)
    every = candidates(table, quick)
    if place.device == "cuda":  # one after the other would take minutes
        calls: list[Launched] = []
        for kernel, how in every:
            with mock.patch.dict(table, {kernel: how}):
                calls += [call for call in launches_of(shape, place.dtype) if call.name == kernel]
        warm_up(calls)
    given = inputs_of(shape, place.dtype, place.device)
    resets = torch.zeros(shape.b, shape.held + shape.t, dtype=torch.bool, device=place.device)
    expected = answers(given, shape, resets)

    def timed(kernel: str, how: Launch) -> dict[str, Any]:
        with mock.patch.dict(table, {kernel: how}), recorded(launch.launch) as launches:
            off = errors(answers(given, shape, resets), expected)
        call = next(call for call in launches if call.name == kernel)
        ms = milliseconds(call, place, rounds)
        return {"ms": ms, "errors": off, "right": max(off.values()) < TOLERANCE[place.dtype]}

    results = []
    for kernel, how in every:
        row = {"kernel": kernel, **how._asdict(), "in use": table[kernel] == how}
        results.append(row | attempt(partial(timed, kernel, how)))
        print(*(value for name, value in results[-1].items() if name != "errors"), flush=True)
    return results


def milliseconds(call: Launched, place: Place, rounds: int) -> float:
    """Of one launch. Kernels that add to what is there add again: the time is the same."""

    def work() -> None:
        for _ in range(LAUNCHES if place.device == "cuda" else 1):
            launch.launch(*call)

    work()
    times = sorted(place.meter.seconds(work) for _ in range(rounds))
    return 1e3 * times[len(times) // 2] / LAUNCHES


def assembler() -> str:
    """Which ptxas turns the kernels into machine code."""
    tool = triton.knobs.nvidia.ptxas
    return f"ptxas {tool.version}" + (" (TRITON_PTXAS_PATH)" if os.environ.get("TRITON_PTXAS_PATH") else "")
