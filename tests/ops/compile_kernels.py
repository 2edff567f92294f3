"""Compile every kernel for a Hopper GPU, on a machine without one, and print JSON: python compile_kernels.py

"resources": resource usage at the sizes of a 340M layer in bfloat16; "with decay" and "with sinks" likewise. "narrow":
lines of the float64 kernels' code that contain float32. "variants": how often each kernel is compiled over calls with
many lengths, windows and numbers of KV entries.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget

from hqlt.bench.gpu_kernels import Launched, Shape, launches_of, warm_up

LENGTHS, HELD, WINDOWS = (1, 16, 35, 64, 100), (0, 1, 16, 9), (1, 7, 16, 64)


class AbsentGPU:
    """Replaces Triton's driver, to compile for a GPU that is not present."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def compiling_for(capability: int = 90) -> Iterator[None]:
    """Context manager in which Triton compiles for a GPU of this compute capability, by default 9.0 (Hopper)."""
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(AbsentGPU(capability))
    try:
        yield
    finally:
        triton.runtime.driver.set_active(before)


def compile_all(launches: list[Launched]) -> list[Any]:
    """The compiled kernel of each launch."""
    return [compiling.result() for compiling in warm_up(launches)]


class Resources(NamedTuple):
    """Resource usage of one program of a compiled kernel."""

    registers: int
    spilled: int
    """Spilled bytes per thread."""
    shared: int
    """Shared memory in bytes."""
    uses_tensor_cores: bool


def resources_of(compiled: Any) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{field}:(\d+)", printed)[1]) for field in ("REG", "STACK"))  # type: ignore[index]
    return Resources(registers, stack, compiled.metadata.shared, "wgmma" in compiled.asm["ptx"])


def variants(calls: list[tuple[Shape, torch.dtype]]) -> dict[str, int]:
    """How often each kernel would be compiled over these calls."""
    keys: dict[str, set[str]] = {}

    def record(*, key: str, fn: Any, **_: Any) -> bool:
        keys.setdefault(fn.name.split(".")[-1], set()).add(str(key))
        return True  # skips the compilation

    with mock.patch.object(triton.knobs.runtime, "jit_cache_hook", record):
        for shape, dtype in calls:
            for call in launches_of(shape, dtype):
                call.warm_up()
    return {name: len(distinct) for name, distinct in keys.items()}


if __name__ == "__main__":
    with compiling_for(90):
        wide, decaying, sinks = (launches_of(Shape(8, 2048, 8, 128, 128, **options), torch.bfloat16)
                                 for options in ({}, {"decays": True}, {"kept": 4}))  # fmt: skip
        exact = launches_of(Shape(1, 70, 2, 16, 16, held=3, window=7, decays=True, kept=4), torch.float64)
        calls = [(Shape(b, t, 2, 16, 16, *rest), torch.bfloat16)
                 for b, t, *rest in itertools.product((1, 3), LENGTHS, HELD, WINDOWS)]  # fmt: skip
        compiled = [{call.name: resources_of(kernel) for call, kernel in zip(of, compile_all(of), strict=True)}
                    for of in (wide, decaying, sinks)]  # fmt: skip
        float64 = {call.name: kernel.asm["ttir"] for call, kernel in zip(exact, compile_all(exact), strict=True)}
        answer = {
            "resources": compiled[0],
            "with decay": compiled[1],
            "with sinks": compiled[2],
            "narrow": {name: re.findall(r".*\bf32\b.*", code) for name, code in float64.items()},
            "variants": variants(calls),
        }
    print(json.dumps(answer))
