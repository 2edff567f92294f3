"""Launch options of the kernels, and the one function that launches them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor


class Launch(NamedTuple):
    """Launch options of one kernel."""

    warps: int
    stages: int = 1
    """Pipeline stages: loop iterations whose data are loaded ahead."""
    block: int = 32
    """Block size: columns of the matrix (both carry kernels), queries (entries_backward) or entries (step)."""


Table = dict[str, Launch]

NARROW: Table = {
    "prepare": Launch(4), "carry": Launch(4, stages=3), "read": Launch(4), "queries_backward": Launch(8),
    "carry_backward": Launch(4, stages=3), "entries_backward": Launch(8), "step": Launch(4), "list_far": Launch(1),
}  # fmt: skip
"""For head widths up to 64."""
WIDE: Table = {
    "prepare": Launch(4), "carry": Launch(4, stages=3), "read": Launch(8), "queries_backward": Launch(8),
    "carry_backward": Launch(4, stages=3), "entries_backward": Launch(8), "step": Launch(8), "list_far": Launch(1),
}  # fmt: skip
"""For wider heads. `hqlt.bench.gpu_kernels.sweep` measures alternatives to the entries of these two tables."""
CHUNK = {2: 64, 4: 32, 8: 32}
"""Tokens per chunk, by the element size in bytes."""


def table_for(k: int, v: int) -> Table:
    return NARROW if max(k, v) <= 64 else WIDE


class Call(NamedTuple):
    """What the kernels of one call share: the numbers of chunks, heads and rows, and constants by name."""

    b: int
    h: int
    g: int
    chunks: int
    named: dict[str, Any]

    def each_chunk(self, kernel: Any, *tensors: Tensor | None) -> None:
        """Launch one program per chunk of new tokens, head and row."""
        self._launch(kernel, self.chunks, tensors)

    def each_chunk_of_queries(self, kernel: Any, *tensors: Tensor | None) -> None:
        """Launch one program per chunk of new tokens, query head and row."""
        self._launch(kernel, self.chunks * self.g, tensors)

    def each_chunk_of_entries(self, kernel: Any, *tensors: Tensor | None) -> None:
        """Launch one program per chunk of entries (held or new), head and row."""
        held = self.named["L"] - self.named["T"]
        self._launch(kernel, -(-held // self.named["C"]) + self.chunks, tensors)

    def each_slice(self, kernel: Any, *tensors: Tensor | None) -> None:
        """Launch one program per block of matrix columns, head and row. It loops over all chunks."""
        self._launch(kernel, -(-self.named["V"] // self._block(kernel)), tensors)

    def each_head(self, kernel: Any, *tensors: Tensor | None) -> None:
        """Launch one program per KV head and row."""
        self._launch(kernel, 1, tensors)

    def each_query_head(self, kernel: Any, *tensors: Tensor | None) -> None:
        """Launch one program per query head and row."""
        self._launch(kernel, self.g, tensors)

    def _options(self, kernel: Any) -> Launch:
        return table_for(self.named["K"], self.named["V"])[kernel.fn.__name__]

    def _block(self, kernel: Any) -> int:
        return min(self._options(kernel).block, self.named["VP"])

    def _launch(self, kernel: Any, programs: int, tensors: tuple[Tensor | None, ...]) -> None:
        known = self.named | {"BLOCK": self._block(kernel)}
        constants = {name: known[name] for name in kernel.arg_names if name in known}
        launch(kernel, programs * self.h * self.b, tensors, constants, self._options(kernel))


def launch(
    kernel: Any, programs: int, tensors: tuple[Tensor | None, ...], constants: dict[str, Any], options: Launch
) -> None:
    """Launch a kernel. All programs are on the grid's first axis, because the other two are limited to 65,535."""
    with torch.cuda.device_of(tensors[0]):
        kernel[(programs,)](*tensors, **constants, num_warps=options.warps, num_stages=options.stages)


def call(q: Tensor, k: Tensor, v: Tensor, most: int = 0, **constants: Any) -> Call:
    """The `Call` for q [b, t, g·h, k], k [b, l, h, k] and v [b, l, h, v].

    most: Number of entries per KV head that stay visible beyond the window. constants: Further constants that kernels
    take by name.
    """
    b, t, heads, width = q.shape
    h, c = k.shape[2], chunk_of(q, v)
    named = {
        "T": t, "L": k.shape[1], "H": h, "G": heads // h, "K": width, "V": v.shape[3], "C": c,
        "KP": 2 * _power_of_two((width + 1) // 2, 8), "VP": _power_of_two(v.shape[3], 16),
        "ACC": tl.float64 if q.dtype == torch.float64 else tl.float32,
        "M": most, "F": min(c, _power_of_two(max(most, 1), 16)),  # entries beyond the window, and how many at a time
        "PRECISION": "tf32" if q.element_size() == 2 else "ieee",  # of the products in the inverse
    }  # fmt: skip
    return Call(b, h, heads // h, -(-t // c), named | constants)


def chunk_of(q: Tensor, v: Tensor) -> int:
    """Tokens per chunk."""
    return CHUNK[q.element_size()]


def _power_of_two(width: int, least: int) -> int:
    return max(1 << (width - 1).bit_length(), least)
