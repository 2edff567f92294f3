"""How the kernels are launched: one table, and the one place that launches."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor


class Launch(NamedTuple):
    """How one kernel is launched."""

    warps: int
    stages: int = 1
    """How many rounds of its loop are loaded ahead."""
    block: int = 32
    """What it takes at a time: columns of a matrix (both carries), queries (pairs_backward), entries (step)."""


Table = dict[str, Launch]

NARROW: Table = {
    "prepare": Launch(4), "carry": Launch(4, stages=3), "read": Launch(4), "queries_backward": Launch(8),
    "carry_backward": Launch(4, stages=3), "pairs_backward": Launch(8), "step": Launch(4),
}  # fmt: skip
"""Heads of up to 64 numbers."""
WIDE: Table = {
    "prepare": Launch(4), "carry": Launch(4, stages=3), "read": Launch(8), "queries_backward": Launch(8),
    "carry_backward": Launch(4, stages=3), "pairs_backward": Launch(8), "step": Launch(8),
}  # fmt: skip
"""Wider heads. `hqlt.bench.gpu_kernels.sweep` exchanges entries of these two tables and measures."""
CHUNK = {2: 64, 4: 32, 8: 32}
"""Tokens in a chunk, by the bytes of a number."""


def table_for(k: int, v: int) -> Table:
    return NARROW if max(k, v) <= 64 else WIDE


class Call(NamedTuple):
    """What the kernels of one call share: how many chunks, heads and rows, and their constants by name."""

    b: int
    h: int
    g: int
    chunks: int
    named: dict[str, Any]

    def each_chunk(self, kernel: Any, *tensors: Tensor | None) -> None:
        """A program for each chunk of new tokens, head and row."""
        self._launch(kernel, self.chunks, tensors)

    def each_chunk_of_queries(self, kernel: Any, *tensors: Tensor | None) -> None:
        """The same for each query head."""
        self._launch(kernel, self.chunks * self.g, tensors)

    def each_chunk_of_pairs(self, kernel: Any, *tensors: Tensor | None) -> None:
        """A program for each chunk of pairs, from before and new, head and row."""
        held = self.named["L"] - self.named["T"]
        self._launch(kernel, -(-held // self.named["C"]) + self.chunks, tensors)

    def each_slice(self, kernel: Any, *tensors: Tensor | None) -> None:
        """A program for each block of a matrix's columns, head and row: it goes through all chunks."""
        self._launch(kernel, -(-self.named["V"] // self._block(kernel)), tensors)

    def each_query_head(self, kernel: Any, *tensors: Tensor | None) -> None:
        """A program for each query head and row."""
        self._launch(kernel, self.g, tensors)

    def _how(self, kernel: Any) -> Launch:
        return table_for(self.named["K"], self.named["V"])[kernel.fn.__name__]

    def _block(self, kernel: Any) -> int:
        return min(self._how(kernel).block, self.named["VP"])

    def _launch(self, kernel: Any, programs: int, tensors: tuple[Tensor | None, ...]) -> None:
        how = self._how(kernel)
        known = self.named | {"BLOCK": self._block(kernel)}
        constants = {name: known[name] for name in kernel.arg_names if name in known}
        launch(kernel, programs * self.h * self.b, tensors, constants, how)


def launch(
    kernel: Any, programs: int, tensors: tuple[Tensor | None, ...], constants: dict[str, Any], how: Launch
) -> None:
    """All programs lie on the grid's first axis: the other two end at 65,535."""
    with torch.cuda.device_of(tensors[0]):
        kernel[(programs,)](*tensors, **constants, num_warps=how.warps, num_stages=how.stages)


def call(q: Tensor, k: Tensor, v: Tensor, **constants: Any) -> Call:
    """q: [b, t, g·h, k], k: [b, l, h, k], v: [b, l, h, v]. constants: what else kernels take by name."""
    b, t, heads, width = q.shape
    h, c = k.shape[2], chunk_of(q, v)
    named = {
        "T": t, "L": k.shape[1], "H": h, "G": heads // h, "K": width, "V": v.shape[3], "C": c,
        "KP": 2 * _power_of_two((width + 1) // 2, 8), "VP": _power_of_two(v.shape[3], 16),
        "ACC": tl.float64 if q.dtype == torch.float64 else tl.float32,
        "PRECISION": "tf32" if q.element_size() == 2 else "ieee",  # of the inverse
    }  # fmt: skip
    return Call(b, h, heads // h, -(-t // c), named | constants)


def chunk_of(q: Tensor, v: Tensor) -> int:
    """Tokens in a chunk."""
    return CHUNK[q.element_size()]


def _power_of_two(width: int, least: int) -> int:
    return max(1 << (width - 1).bit_length(), least)
