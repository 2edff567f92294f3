"""Whether the kernels of `hqlt.ops.synchronous` are right on the GPU that is here."""

from __future__ import annotations

import os
from typing import Any

import torch
import triton
from torch import Tensor

from hqlt.bench.gpu import Place
from hqlt.bench.gpu_compile import Shape, launches_of, warm_up
from hqlt.memory.rotary import Rotary
from hqlt.ops import synchronous
from hqlt.shapes import at_least_float32

NAMES = ("y", "W", "dq", "dk", "dv", "dβ", "dgate", "dnorm", "dW")
TOLERANCE = {torch.bfloat16: 5e-2, torch.float16: 6e-3, torch.float32: 3e-6, torch.float64: 1e-12}
"""Of outputs and gradients, as a part of their norm, against the reference in float64 on the same numbers."""
SHAPES = (
    Shape(1, 1, 1, 4, 3, held=7, window=8),
    Shape(3, 65, 2, 18, 33, held=1, window=64),
    Shape(2, 131, 2, 64, 64, held=9, window=10),
    Shape(2, 330, 2, 128, 128, held=63, window=64),
    Shape(2, 256, 3, 128, 64, held=0, window=256),
)
TINY = (Shape(1, 35, 1, 4, 3, held=2, window=3),)


def inputs_of(shape: Shape, dtype: torch.dtype, device: str) -> list[Tensor]:
    """q, k, v, β, gate, norm weight, W_0: the same numbers in every type, up to rounding."""
    b, t, h, k, v, held, _ = shape
    random, wide = torch.Generator().manual_seed(0), at_least_float32(dtype)

    def normal(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*size, generator=random, dtype=torch.float64).to(device, dtype)

    q, key, value = normal(b, t, h, k), normal(b, held + t, h, k), normal(b, held + t, h, v)
    beta = (2 * normal(b, t, h, dtype=torch.float64).sigmoid()).to(wide)
    return [q, key, value, beta, normal(b, t, h, v), 1 + 0.3 * normal(v), normal(b, h, k, v, dtype=wide)]


def answers(given: list[Tensor], shape: Shape, resets: Tensor, backend: str) -> list[Tensor]:
    """Outputs, final matrix, and all gradients of a fixed direction."""
    *inputs, state = (x.detach().requires_grad_() for x in given)
    device, wide = given[0].device, at_least_float32(given[0].dtype)
    rotary = None if shape.k % 2 else Rotary(1e4).table(shape.held + shape.t, shape.k, device, wide)
    out = synchronous(
        *inputs, window=shape.window, rotary=rotary, state=state, resets=resets, backend=backend
    )  # fmt: skip
    random = torch.Generator().manual_seed(1)
    directions = [torch.randn(x.shape, generator=random, dtype=torch.float64).to(x) for x in out]
    return [x.detach() for x in (*out, *torch.autograd.grad(out, [*inputs, state], directions))]


def errors(got: list[Tensor], expected: list[Tensor]) -> dict[str, float]:
    """‖got − expected‖ / ‖expected‖ of each, by name."""
    return {
        name: ((mine.double() - theirs.double()).norm() / theirs.double().norm().clamp_min(1e-6)).item()
        for name, mine, theirs in zip(NAMES, got, expected, strict=True)
    }


def compare(shape: Shape, dtype: torch.dtype, device: str, again: int) -> dict[str, Any]:
    """Ours against the reference, and against itself `again` times: what threads race for changes from run to run."""
    given = inputs_of(shape, dtype, device)
    random = torch.Generator().manual_seed(2)
    resets = (torch.rand(shape.b, shape.held + shape.t, generator=random) < 0.02).to(device)
    got = answers(given, shape, resets, "triton")
    repeated = [answers(given, shape, resets, "triton") for _ in range(again)]
    off = errors(got, answers([x.double() for x in given], shape, resets, "reference"))
    same = all(torch.equal(mine, theirs) for other in repeated for mine, theirs in zip(got, other, strict=True))
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "shape": shape._asdict(),
        "errors": off,
        "same again": same,
        "right": same and all(error < TOLERANCE[dtype] for error in off.values()),
    }


def run(place: Place, again: int = 3) -> list[dict[str, Any]]:
    """Every type and shape; what does not run is in the answer with its reason."""
    if place.device == "cpu":  # interpreted: without bfloat16, whose products are wrong there
        cases = [(TINY[0], dtype) for dtype in (torch.float64, torch.float32, torch.float16)]
    else:  # wide heads in the types that they are for
        cases = [(shape, dtype) for dtype in TOLERANCE for shape in SHAPES if shape.k <= 64 or dtype.itemsize == 2]
        warm_up([call for case in cases for call in launches_of(*case)])
    results = []
    for shape, dtype in cases:
        try:
            row = compare(shape, dtype, place.device, again)
        except Exception as error:
            row = {"dtype": str(dtype).removeprefix("torch."), "shape": shape._asdict(), "right": False}
            row["failed"] = f"{type(error).__name__}: {error}"[:500]
        worst = max(row.get("errors", {"": float("nan")}).items(), key=lambda item: item[1])
        print(
            f"{'right' if row['right'] else 'WRONG'}  {row['dtype']:9} {tuple(shape)}  worst {worst[0]} "
            f"{worst[1]:.1e}  {row.get('failed', '')[:100]}",
            flush=True,
        )
        results.append(row)
    return results


def assembler() -> str:
    """Which ptxas turns the kernels into machine code."""
    tool = triton.knobs.nvidia.ptxas
    return f"ptxas {tool.version}" + (" (TRITON_PTXAS_PATH)" if os.environ.get("TRITON_PTXAS_PATH") else "")
