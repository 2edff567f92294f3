"""The state of one layer: a value that users hold.

Calls return a new state and leave the old one as it was, so keeping the old one is a fork, and going back to it a
rollback. Every part is a tensor whose first axis is the batch row, so rows can be picked, repeated and joined freely.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hqlt.shapes import at_least_float32


class MemoryState(NamedTuple):
    """What a layer remembers between two calls. Its shape does not depend on how much the layer has seen.

    (One exception: a KV-memory with window None holds every pair, because full attention forgets nothing.)
    """

    keys: Tensor
    """[b, s, h, k] the pairs held by the KV-memory, oldest first, the latest in slot s−1; zeros in unused slots.
    Raw: before φ and before rotary positions."""
    values: Tensor
    """[b, s, h, v] their values."""
    betas: Tensor
    """[b, s, h] their write strengths, for the blend that writes them later; [b, s, 0] for the others."""
    fast_weights: Tensor
    """[b, h, k, v] the FW-memory's matrix, in at least float32; [b, 0, k, v] without an FW-memory."""
    key_sum: Tensor
    """[b, h, k] the normaliser of linear attention; [b, h, 0] for the delta rule."""
    position: Tensor
    """[b] int64: tokens that the row has seen since its last reset."""
    convolution: Tensor
    """[b, c−1, 3·d] the latest inputs of a short convolution over c tokens; [b, 0, 3·d] without one."""

    def map(self, change: Callable[[Tensor], Tensor]) -> MemoryState:
        """The same change to every part."""
        return MemoryState(*map(change, self))

    def select(self, rows: Tensor | Sequence[int]) -> MemoryState:
        """These rows, in this order, repeated where named twice: beams, agents, requests of a batch."""
        index = torch.as_tensor(rows, device=self.position.device)
        if index.dtype == torch.bool:
            raise ValueError("rows: expected indices of rows, got a bool mask; use mask.nonzero()[:, 0]")
        index = index.long()
        return self.map(lambda x: x.index_select(0, index))

    def repeat(self, times: int) -> MemoryState:
        """Every row `times` times, copies side by side: a prompt read once, continued in many ways."""
        return self.map(lambda x: x.repeat_interleave(times, dim=0))

    @staticmethod
    def concatenate(states: Sequence[MemoryState]) -> MemoryState:
        """The rows of several states of one layer in one batch."""
        if not states:
            raise ValueError("states: expected at least one state to concatenate, got none")
        longest = max(state.keys.shape[1] for state in states)
        aligned = [state.with_slots(longest) for state in states]
        try:
            return MemoryState(*(torch.cat(parts) for parts in zip(*aligned, strict=True)))
        except RuntimeError as error:
            raise ValueError(f"states: expected states of one layer, got parts that do not fit: {error}") from error

    def with_slots(self, s: int) -> MemoryState:
        """The same pairs in a buffer of s ≥ the present number of slots; the new, unused ones come first."""
        more = s - self.keys.shape[1]

        def unused_before(x: Tensor) -> Tensor:
            return torch.cat([x.new_zeros(x.shape[0], more, *x.shape[2:]), x], dim=1)

        return self._replace(
            keys=unused_before(self.keys),
            values=unused_before(self.values),
            betas=unused_before(self.betas),
        )

    def detach(self) -> MemoryState:
        """The same memory without its history: truncated back-propagation through time."""
        return self.map(Tensor.detach)

    def clone(self) -> MemoryState:
        """A copy in memory of its own. A fork needs none: calls never change the state they are given."""
        return self.map(Tensor.clone)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> MemoryState:
        """Moved to a device, and its pairs to a dtype. Fast weights stay in at least float32: they add up."""

        def move(x: Tensor, dtype: torch.dtype | None) -> Tensor:
            return x.to(device=device, dtype=dtype if dtype and x.is_floating_point() else x.dtype)

        wide = dtype and at_least_float32(dtype)
        return MemoryState(
            **{
                name: move(part, wide if name in ("fast_weights", "key_sum", "betas") else dtype)
                for name, part in self._asdict().items()
            }
        )

    def bytes_per_row(self) -> int:
        """How much memory a row of this state takes."""
        return sum(x.numel() * x.element_size() for x in self) // max(len(self.position), 1)
