"""Correctness of the kernels of `hqlt.ops.synchronous` on a GPU, and a search for their best launch options.

The launches of a call can be recorded on meta tensors, without running them. This allows kernels to be compiled ahead
of time, on all processors in parallel, and to be timed one by one.
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

from hqlt.bench.gpu import Target
from hqlt.errors import first_line
from hqlt.memory.rotary import Rotary
from hqlt.ops import Beyond, expiry, synchronous
from hqlt.ops.synchronous.kernels import launch, operators
from hqlt.ops.synchronous.kernels.launch import Launch
from hqlt.shapes import at_least_float32

NAMES = ("y", "W", "dq", "dk", "dv", "dβ", "dgate", "dnorm", "dW", "dlogα")
TOLERANCE = {torch.bfloat16: 5e-2, torch.float16: 6e-3, torch.float32: 3e-6, torch.float64: 1e-12}
"""Accepted error of outputs and gradients, relative to the norm of the reference's in float64 on the same numbers."""
BLOCKED = ("carry", "carry_backward", "entries_backward")
"""Kernels with a variable `block`."""
LAUNCHES = 20
"""Launches of a kernel per time measurement."""


class Shape(NamedTuple):
    """Shape of a call: rows, tokens, heads, widths, held KV entries, window, and whether the matrix decays."""

    b: int
    t: int
    h: int
    k: int
    v: int
    held: int = 0
    window: int = 64
    decays: bool = False
    kept: int = 0
    """Entries per KV head that stay visible beyond the window."""


SHAPES = (
    Shape(1, 1, 1, 4, 3, held=7, window=8),
    Shape(3, 65, 2, 18, 33, held=1, window=64),
    Shape(2, 131, 2, 64, 64, held=9, window=10),
    Shape(2, 330, 2, 128, 128, held=63, window=64),
    Shape(2, 256, 3, 128, 64, held=0, window=256),
    Shape(2, 131, 2, 64, 64, held=9, window=10, decays=True),
    Shape(2, 330, 2, 128, 128, held=63, window=64, decays=True),
    Shape(2, 131, 2, 64, 64, held=30, window=10, kept=4),
    Shape(2, 330, 2, 128, 128, held=63, window=16, decays=True, kept=48),
)
TINY = Shape(1, 35, 1, 4, 3, held=2, window=3, decays=True, kept=2)


class Launched(NamedTuple):
    """The arguments of one call of `hqlt.ops.synchronous.kernels.launch.launch`."""

    kernel: Any
    programs: int
    tensors: tuple[Tensor | None, ...]
    constants: dict[str, Any]
    options: Launch

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    def warm_up(self) -> Any:
        """Compile the kernel, and return it."""
        warps, stages = self.options.warps, self.options.stages
        return self.kernel.warmup(
            *self.tensors, **self.constants, grid=(self.programs,), num_warps=warps, num_stages=stages
        )


@contextlib.contextmanager
def recorded(then: Callable[..., None] = lambda *_: None) -> Iterator[list[Launched]]:
    """Context manager that records launches. They are passed on to `then`, which by default does not run them."""
    launches: list[Launched] = []

    def record(*call: Any) -> None:
        launches.append(Launched(*call))
        then(*call)

    with mock.patch.object(launch, "launch", record):
        yield launches


def launches_of(shape: Shape, dtype: torch.dtype, resets: bool = True) -> list[Launched]:
    """All launches of a forward pass, a backward pass and a call of one token, one per kernel."""
    b, t, h, k, v, held, window, decays, most = shape
    l, wide = held + t, at_least_float32(dtype)

    def meta(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(*size, dtype=dtype, device="meta")

    q, key, value, gate, weight = meta(b, t, h, k), meta(b, l, h, k), meta(b, l, h, v), meta(b, t, h, v), meta(v)
    beta, matrix, table = meta(b, t, h, dtype=wide), meta(b, h, k, v, dtype=wide), meta(l, 1, k // 2, dtype=wide)
    marks, position = meta(b, l, dtype=torch.bool) if resets else None, meta(b, dtype=torch.long)
    decay = meta(b, t, h, dtype=wide) if decays else None
    expires = meta(b, l, h, dtype=torch.int32) if most else None
    inputs = q, key, value, beta, gate, weight, matrix, decay, table, table, marks, expires
    new_q, new_k, new_v, new_beta, new_gate = (x[:, :1] for x in (q, key, value, beta, gate))
    new_decay = None if decay is None else decay[:, :1]
    scale, norm_eps = k**-0.5, 1e-6
    with recorded() as launches:
        _, _, *saved = operators.run_forward(*inputs, window, scale, norm_eps, most)
        arguments: tuple[Any, ...] = *inputs[:6], *inputs[7:], *saved, gate, matrix, window, scale, norm_eps, most
        operators.run_backward(*arguments)
        operators.run_one_token(
            new_q, new_k, new_v, new_beta, new_gate, weight, new_decay, table, table, None,
            meta(b, window - 1, h, k), meta(b, window - 1, h, v), matrix, position, scale, norm_eps,
        )  # fmt: skip
    return list({call.name: call for call in launches}.values())


def warm_up(launches: list[Launched]) -> list[Future[Any]]:
    """Compile on all processors in parallel. A compilation error is raised by its future, and again at launch."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [pool.submit(call.warm_up) for call in launches]


def inputs_of(shape: Shape, dtype: torch.dtype, device: str) -> list[Tensor]:
    """q, k, v, β, gate, norm weight, W_0 and, with decay, log α: the same numbers in every dtype, up to rounding."""
    b, t, h, k, v, held, _, decays, _ = shape
    random, wide = torch.Generator().manual_seed(0), at_least_float32(dtype)

    def normal(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*size, generator=random, dtype=torch.float64).to(device, dtype)

    q, key, value = normal(b, t, h, k), normal(b, held + t, h, k), normal(b, held + t, h, v)
    beta = (2 * normal(b, t, h, dtype=torch.float64).sigmoid()).to(wide)
    inputs = [q, key, value, beta, normal(b, t, h, v), 1 + 0.3 * normal(v), normal(b, h, k, v, dtype=wide)]
    return [*inputs, -0.1 * normal(b, t, h, dtype=wide).exp()] if decays else inputs


def _beyond(shape: Shape, resets: Tensor) -> Beyond | None:
    """Entries that stay visible beyond the window: those with the highest of random scores."""
    if not shape.kept:
        return None
    b, l = resets.shape
    scores = torch.rand(b, l, shape.h, generator=torch.Generator().manual_seed(3)).to(resets.device)
    leaves = (torch.arange(l, device=resets.device) + shape.window).expand(b, l)
    return Beyond(expiry(scores, leaves, kept=shape.kept, resets=resets), shape.kept)


def outputs_and_gradients(tensors: list[Tensor], shape: Shape, resets: Tensor, backend: str = "triton") -> list[Tensor]:
    """Outputs, final matrix, and all gradients for a fixed random gradient of the outputs."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    *inputs, state = leaves[:7]
    decay = leaves[7] if shape.decays else None
    device, wide = tensors[0].device, at_least_float32(tensors[0].dtype)
    rotary = None if shape.k % 2 else Rotary(1e4).table(shape.held + shape.t, shape.k, device, wide)
    options: dict[str, Any] = {
        "window": shape.window,
        "rotary": rotary,
        "state": state,
        "decay": decay,
        "resets": resets,
        "beyond": _beyond(shape, resets),
        "backend": backend,
    }
    out = synchronous(*inputs, **options)
    random = torch.Generator().manual_seed(1)
    directions = [torch.randn(x.shape, generator=random, dtype=torch.float64).to(x) for x in out]
    return [x.detach() for x in (*out, *torch.autograd.grad(out, leaves, directions))]


def errors(got: list[Tensor], expected: list[Tensor]) -> dict[str, float]:
    """Relative errors ‖got − expected‖ / ‖expected‖, by name."""
    return {
        name: ((mine.double() - theirs.double()).norm() / theirs.double().norm().clamp_min(1e-6)).item()
        for name, mine, theirs in zip(NAMES[: len(got)], got, expected, strict=True)
    }


def compare(shape: Shape, dtype: torch.dtype, device: str, repeats: int) -> dict[str, Any]:
    """Compare the kernels with the reference, and `repeats` times with themselves, since data races vary between
    runs."""
    inputs = inputs_of(shape, dtype, device)
    random = torch.Generator().manual_seed(2)
    resets = (torch.rand(shape.b, shape.held + shape.t, generator=random) < 0.02).to(device)
    got = outputs_and_gradients(inputs, shape, resets)
    repeated = [outputs_and_gradients(inputs, shape, resets) for _ in range(repeats)]
    off = errors(got, outputs_and_gradients([x.double() for x in inputs], shape, resets, "reference"))
    same = all(torch.equal(mine, theirs) for other in repeated for mine, theirs in zip(got, other, strict=True))
    return {"errors": off, "same again": same, "right": same and max(off.values()) < TOLERANCE[dtype]}


def check(target: Target, repeats: int = 3) -> list[dict[str, Any]]:
    """Compare every dtype and shape. Cases that do not run are reported with the reason."""
    if target.device == "cpu":  # interpreted; not bfloat16, whose products are wrong in the interpreter
        cases = [(TINY, dtype) for dtype in (torch.float64, torch.float32, torch.float16)]
    else:  # wide heads only in 16 bits
        cases = [(shape, dtype) for dtype in TOLERANCE for shape in SHAPES if shape.k <= 64 or dtype.itemsize == 2]
        warm_up([call for case in cases for call in launches_of(*case)])
    results = []
    for shape, dtype in cases:
        row = {"dtype": str(dtype).removeprefix("torch."), "shape": shape._asdict()}
        results.append(row | attempt(partial(compare, shape, dtype, target.device, repeats)))
        print(*results[-1].values(), flush=True)
    return results


def attempt(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result of the work, or the reason why it failed."""
    try:
        return work()
    except Exception as error:  # such as not enough shared memory
        return {"right": False, "failed": f"{type(error).__name__}: {first_line(error)}"[:300]}


def candidates(table: launch.Table, quick: bool) -> list[tuple[str, Launch]]:
    """Kernels and launch options to try; for each kernel, those in the table come first."""
    every = []
    for kernel, in_use in table.items():
        blocks = (16, 32, 64) if kernel in BLOCKED else (in_use.block,)
        others = [Launch(*options) for options in product((4, 8), (1, 2, 3), blocks)]
        if quick:
            others = [in_use._replace(block=16)] if kernel in BLOCKED else []
        every += [
            (kernel, options) for options in dict.fromkeys([in_use, *others]) if kernel not in ("step", "list_far")
        ]
    return every


def sweep(target: Target, shape: Shape, rounds: int, quick: bool = False) -> list[dict[str, Any]]:
    """Try launch options, changing one entry of the launch table at a time.

    The whole operation, forward and backward, is compared with the result of the unchanged table. The changed kernel is
    timed separately, on the tensors of its recorded launch.
    """
    table = launch.table_for(shape.k, shape.v)
    every = candidates(table, quick)
    if target.device == "cuda":  # compile in parallel; one by one would take minutes
        calls: list[Launched] = []
        for kernel, options in every:
            with mock.patch.dict(table, {kernel: options}):
                calls += [call for call in launches_of(shape, target.dtype) if call.name == kernel]
        warm_up(calls)
    inputs = inputs_of(shape, target.dtype, target.device)
    resets = torch.zeros(shape.b, shape.held + shape.t, dtype=torch.bool, device=target.device)
    expected = outputs_and_gradients(inputs, shape, resets)

    def timed(kernel: str, options: Launch) -> dict[str, Any]:
        with mock.patch.dict(table, {kernel: options}), recorded(launch.launch) as launches:
            off = errors(outputs_and_gradients(inputs, shape, resets), expected)
        call = next(call for call in launches if call.name == kernel)
        ms = milliseconds(call, target, rounds)
        return {"ms": ms, "errors": off, "right": max(off.values()) < TOLERANCE[target.dtype]}

    results = []
    for kernel, options in every:
        row = {"kernel": kernel, **options._asdict(), "in use": table[kernel] == options}
        results.append(row | attempt(partial(timed, kernel, options)))
        print(*(value for name, value in results[-1].items() if name != "errors"), flush=True)
    return results


def milliseconds(call: Launched, target: Target, rounds: int) -> float:
    """Median time of one launch. Kernels that accumulate into a tensor do so again, which does not change the time."""

    def work() -> None:
        for _ in range(LAUNCHES if target.device == "cuda" else 1):
            launch.launch(*call)

    work()
    times = sorted(target.meter.seconds(work) for _ in range(rounds))
    return 1e3 * times[len(times) // 2] / LAUNCHES


def assembler() -> str:
    """The ptxas that assembles the kernels."""
    tool = triton.knobs.nvidia.ptxas
    return f"ptxas {tool.version}" + (" (TRITON_PTXAS_PATH)" if os.environ.get("TRITON_PTXAS_PATH") else "")
