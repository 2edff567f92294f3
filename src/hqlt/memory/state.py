"""The state of one layer: a value that users hold.

Calls return a new state and leave the old one as it was, so keeping the old one is a fork, and going back to it a
rollback. It is a tree of tensors whose first axis is the batch row, so rows can be picked, repeated and joined freely,
whatever the memories hold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hqlt.shapes import at_least_float32

Tree: TypeAlias = Any
"""Tensors (or what describes them) in NamedTuples, tuples within tuples; () holds nothing."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a state, without its batch row."""

    sizes: tuple[int | None, ...]
    """None: grows with the context."""
    dtype: str = "wide"
    """"narrow": the layer's own; "wide": at least float32, for what adds up; "int64"."""

    def zeros(self, b: int, like: Tensor, device: torch.device | str | None) -> Tensor:
        sizes = [size or 0 for size in self.sizes]
        device = like.device if device is None else device
        return torch.zeros(b, *sizes, dtype=self.dtype_in(like.dtype), device=device)

    def dtype_in(self, narrow: torch.dtype) -> torch.dtype:
        """Of this tensor, in a layer of this dtype."""
        return {"narrow": narrow, "wide": at_least_float32(narrow), "int64": torch.int64}[self.dtype]


class Held(NamedTuple):
    """The pairs that a KV-memory holds between two calls."""

    keys: Tensor
    """[b, s, h, k] oldest first, the latest in slot s−1; zeros in unused slots. Raw: before φ and before rotary
    positions."""
    values: Tensor
    """[b, s, h, v]"""
    gates: Tree
    """[b, s, …] each: how a pair will be written, for the blends that write it later with its own gates; () for the
    others."""
    kept: Tree = ()
    """What a retention keeps beyond the window, of a fixed number of slots; () where it keeps nothing."""

    def with_slots(self, s: int) -> Held:
        """The same pairs in a buffer of s slots, at least those in use; unused ones come, or are dropped, first."""
        more = s - self.keys.shape[1]

        def fit(x: Tensor) -> Tensor:
            return x[:, -more:] if more < 0 else torch.cat([x.new_zeros(x.shape[0], more, *x.shape[2:]), x], dim=1)

        keys, values, gates = pytree.tree_map(fit, (self.keys, self.values, self.gates))
        return Held(keys, values, gates, self.kept)


class MemoryState(NamedTuple):
    """What a layer remembers between two calls. Its shape does not depend on how much the layer has seen.

    (One exception: a KV-memory with window None holds every pair, because full attention forgets nothing.)
    """

    kv: Held | tuple[()]
    """The KV-memory's part; () without one."""
    fw: Tree
    """The FW-memory's part, the write rule's own NamedTuple, in at least float32; () without one."""
    convolution: Tensor
    """[b, c−1, channels] the latest inputs of a short convolution over c tokens; [b, 0, channels] without one."""
    position: Tensor
    """[b] int64: tokens that the row has seen since its last reset."""

    def __repr__(self) -> str:
        """In one line: each tensor's shape."""
        if not all(isinstance(x, Tensor) for x in self.leaves()):  # a tree of what describes them
            return tuple.__repr__(self)
        shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in self.named_leaves().items())
        return f"MemoryState({shapes}; {self.bytes_per_row():,} bytes per row)"

    def leaves(self) -> list[Tensor]:
        """All tensors, in the order of their names."""
        return leaves(self)

    def named_leaves(self) -> dict[str, Tensor]:
        """All tensors by name: "kv.keys", "fw.matrix", "position"."""
        return named(self)

    def map(self, change: Callable[[Tensor], Tensor]) -> MemoryState:
        """The same change to every tensor."""
        return pytree.tree_map(change, self)

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
        longest = max(state.slots for state in states)
        try:
            return pytree.tree_map(lambda *parts: torch.cat(parts), *(state.with_slots(longest) for state in states))
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"states: expected states of one layer, got parts that do not fit: {error}") from error

    @property
    def slots(self) -> int:
        """Pairs that the buffer has room for."""
        return _slots(self.kv)

    def with_slots(self, s: int) -> MemoryState:
        """The same memories, their pairs in a buffer of s slots, at least those in use."""
        return (
            self if s == _slots(self.kv) or not isinstance(self.kv, Held) else self._replace(kv=self.kv.with_slots(s))
        )

    def where(self, rows: Tensor, other: MemoryState) -> MemoryState:
        """This state in the rows that are True, Bool[b], and the other in the rest."""
        s = max(_slots(self.kv), _slots(other.kv))

        def choose(mine: Tensor, theirs: Tensor) -> Tensor:
            return torch.where(rows.view(-1, *[1] * (mine.dim() - 1)), mine, theirs)

        return pytree.tree_map(choose, self.with_slots(s), other.with_slots(s))

    def detach(self) -> MemoryState:
        """The same memory without its history: truncated back-propagation through time."""
        return self.map(Tensor.detach)

    def clone(self) -> MemoryState:
        """A copy in memory of its own. A fork needs none: calls never change the state they are given."""
        return self.map(Tensor.clone)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> MemoryState:
        """Moved to a device, and its pairs to a dtype. Fast weights, which add up, stay in at least float32."""

        def move(x: Tensor, dtype: torch.dtype | None) -> Tensor:
            return x.to(device=device, dtype=dtype if dtype and x.is_floating_point() else x.dtype)

        moved = self.map(lambda x: move(x, dtype and at_least_float32(dtype)))
        if isinstance(self.kv, Held) and isinstance(moved.kv, Held):
            held, kept = self.kv, moved.kv.kept
            if kept:
                kept = kept._replace(keys=move(held.kept.keys, dtype), values=move(held.kept.values, dtype))
            keys, values = move(held.keys, dtype), move(held.values, dtype)
            moved = moved._replace(kv=moved.kv._replace(keys=keys, values=values, kept=kept))
        return moved._replace(convolution=move(self.convolution, dtype))

    def bytes_per_row(self) -> int:
        """How much memory a row of this state takes."""
        return sum(x.numel() * x.element_size() for x in self.leaves()) // max(len(self.position), 1)


def _slots(kv: Held | tuple[()]) -> int:
    """`MemoryState.slots`, where it is compiled: torch 2.9 compiles no property of a NamedTuple."""
    return kv.keys.shape[1] if isinstance(kv, Held) else 0


def leaves(tree: Tree) -> list[Any]:
    """All that a tree holds. (torch's pytree says the same in ten times the time, a tenth of a small layer's token.)"""
    found: list[Any] = []
    for part in tree:
        if isinstance(part, tuple):
            found += leaves(part)
        else:
            found.append(part)
    return found


def named(tree: Tree, prefix: str = "") -> dict[str, Any]:
    """The leaves of a tree by name: fields of NamedTuples and indices of tuples, joined by dots."""
    if not isinstance(tree, tuple):
        return {prefix: tree}
    fields = getattr(tree, "_fields", range(len(tree)))
    before = f"{prefix}." if prefix else ""
    return {
        name: leaf
        for field, part in zip(fields, tree, strict=True)
        for name, leaf in named(part, f"{before}{field}").items()
    }
