"""What the kernels of `hqlt.ops.synchronous` are launched on, recorded: on tensors without memory, if need be, so that
they are compiled before anything runs, or for a GPU that is not there."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor

from hqlt.ops.synchronous.kernels import launch, operators
from hqlt.ops.synchronous.kernels.launch import Launch
from hqlt.shapes import at_least_float32


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
        """→ the compiled kernel (or what is to become it, within `triton.AsyncCompileMode`)."""
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


class Shape(NamedTuple):
    """Of a call: rows, tokens, heads, widths; KV entries from before, and the window."""

    b: int
    t: int
    h: int
    k: int
    v: int
    held: int = 0
    window: int = 64


def launches_of(shape: Shape, dtype: torch.dtype, resets: bool = True) -> list[Launched]:
    """Everything that forward, backward and a call of one token launch."""
    b, t, h, k, v, held, window = shape
    l, wide = held + t, at_least_float32(dtype)

    def of(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(*size, dtype=dtype, device="meta")

    q, key, value, gate, weight = of(b, t, h, k), of(b, l, h, k), of(b, l, h, v), of(b, t, h, v), of(v)
    beta, matrix, table = of(b, t, h, dtype=wide), of(b, h, k, v, dtype=wide), of(l, 1, k // 2, dtype=wide)
    marks, position = of(b, l, dtype=torch.bool) if resets else None, of(b, dtype=torch.long)
    inputs = q, key, value, beta, gate, weight, matrix, table, table, marks
    new_q, new_k, new_v, new_beta, new_gate = (x[:, :1] for x in (q, key, value, beta, gate))
    scale, norm_eps = k**-0.5, 1e-6
    with recorded() as launches:
        operators.run_forward(*inputs, window, scale, norm_eps)
        operators.run_backward(*inputs, gate, matrix, window, scale, norm_eps)
        operators.run_one_token(
            new_q, new_k, new_v, new_beta, new_gate, weight, table, table, None,
            of(b, window - 1, h, k), of(b, window - 1, h, v), matrix, position, scale, norm_eps,
        )  # fmt: skip
    return list({call.name: call for call in launches}.values())


def warm_up(launches: list[Launched]) -> list[Any]:
    """Compile on all processors at once, and leave out what does not compile: it says why when it is launched."""
    with ThreadPoolExecutor(os.cpu_count()) as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
        return [call.warm_up() for call in launches]
