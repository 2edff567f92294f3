"""The state of one layer, an immutable value that callers hold.

Calls return a new state and do not modify the given one: keeping the old state forks a sequence, and returning to it
rolls the sequence back. A state is a tree of tensors whose first axis is the batch, so rows can be selected, repeated
and joined whatever the memories are.
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
"""Nested NamedTuples of tensors (or of `Entry`s); () is the empty tree."""


@dataclass(frozen=True)
class Entry:
    """The description of one tensor of a state.

    Example:
        >>> import torch
        >>> from hqlt.memory import Entry
        >>> Entry((4, 16)).zeros(2, torch.empty(0, dtype=torch.bfloat16), None).dtype
        torch.float32
    """

    sizes: tuple[int | None, ...]
    """Sizes without the batch axis. None: grows with the context."""
    dtype: str = "wide"
    """"narrow": the dtype of the layer; "wide": at least float32, for sums over time; "int64"."""

    def zeros(self, b: int, like: Tensor, device: torch.device | str | None) -> Tensor:
        """Return zeros for b rows, in a layer with the dtype (and by default the device) of `like`."""
        sizes = [size or 0 for size in self.sizes]
        device = like.device if device is None else device
        return torch.zeros(b, *sizes, dtype=self.dtype_in(like.dtype), device=device)

    def dtype_in(self, narrow: torch.dtype) -> torch.dtype:
        """Return the dtype of this tensor in a layer of dtype `narrow`."""
        return {"narrow": narrow, "wide": at_least_float32(narrow), "int64": torch.int64}[self.dtype]


class Held(NamedTuple):
    """The KV entries that a KV-memory holds between two calls."""

    keys: Tensor
    """[b, s, h, k] from the oldest to the latest (slot s−1), with zeros in unused slots; before feature map and rotary
    embedding"""
    values: Tensor
    """[b, s, h, v]"""
    gates: Tree
    """[b, s, …] each: gates of the write rule, for blends that write an entry later with its own gates; () for other
    blends"""
    kept: Tree = ()
    """Entries that a retention keeps beyond the window, in a fixed number of slots; () if it keeps none"""

    def with_slots(self, s: int) -> Held:
        """Return the same entries in s slots (at least as many as are in use); unused slots come first."""
        more = s - self.keys.shape[1]

        def fit(x: Tensor) -> Tensor:
            return x[:, -more:] if more < 0 else torch.cat([x.new_zeros(x.shape[0], more, *x.shape[2:]), x], dim=1)

        keys, values, gates = pytree.tree_map(fit, (self.keys, self.values, self.gates))
        return Held(keys, values, gates, self.kept)


class MemoryState(NamedTuple):
    """What a layer remembers between two calls.

    Its size does not depend on the number of tokens, except that a KV-memory with full attention (window None) holds
    every entry.

    Example:
        >>> import torch, hqlt
        >>> layer = hqlt.HybridMemory(hidden_size=64, num_heads=4, window=8)
        >>> y, state = layer(torch.randn(1, 100, 64))
        >>> state
        MemoryState(kv.keys [1, 7, 4, 16], kv.values [1, 7, 4, 16], fw.matrix [1, 4, 16, 16], ...; ... bytes per row)
        >>> continued = layer(torch.randn(3, 1, 64), state=state.repeat(3))
    """

    kv: Held | tuple[()]
    """The KV-memory's part; () without a KV-memory"""
    fw: Tree
    """The FW-memory's part, a NamedTuple of the write rule in at least float32; () without an FW-memory"""
    convolution: Tensor
    """[b, c−1, channels]: the latest inputs of a short convolution of size c; [b, 0, channels] without a convolution"""
    position: Tensor
    """[b] int64: tokens of each row since its last reset"""

    def __repr__(self) -> str:
        """Return one line with the shape of each tensor."""
        if not all(isinstance(x, Tensor) for x in self.leaves()):  # a tree of `Entry`s
            return tuple.__repr__(self)
        shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in self.named_leaves().items())
        return f"MemoryState({shapes}; {self.bytes_per_row():,} bytes per row)"

    def leaves(self) -> list[Tensor]:
        """Return all tensors, in the order of `named_leaves`."""
        return leaves(self)

    def named_leaves(self) -> dict[str, Tensor]:
        """Return all tensors by name, such as "kv.keys", "fw.matrix" and "position"."""
        return named(self)

    def map(self, change: Callable[[Tensor], Tensor]) -> MemoryState:
        """Apply a function to every tensor."""
        return pytree.tree_map(change, self)

    def select(self, rows: Tensor | Sequence[int]) -> MemoryState:
        """Return these rows in this order, such as beams, agents or requests of a batch.

        Args:
            rows (Int[n]): indices of rows, which may occur more than once.

        Returns:
            A state of n rows.

        Raises:
            ValueError: when given a bool mask.
        """
        index = torch.as_tensor(rows, device=self.position.device)
        if index.dtype == torch.bool:
            raise ValueError("rows: expected indices of rows, got a bool mask; use mask.nonzero()[:, 0]")
        index = index.long()
        return self.map(lambda x: x.index_select(0, index))

    def repeat(self, times: int) -> MemoryState:
        """Repeat each row `times` times in adjacent rows, for example to continue one prompt in several ways."""
        return self.map(lambda x: x.repeat_interleave(times, dim=0))

    @staticmethod
    def concatenate(states: Sequence[MemoryState]) -> MemoryState:
        """Join the rows of several states of one layer into one batch.

        Raises:
            ValueError: when there are no states, or when they belong to different layers.
        """
        if not states:
            raise ValueError("states: expected at least one state to concatenate, got none")
        longest = max(state.slots for state in states)
        try:
            return pytree.tree_map(lambda *parts: torch.cat(parts), *(state.with_slots(longest) for state in states))
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"states: expected states of one layer, got parts that do not fit: {error}") from error

    @property
    def slots(self) -> int:
        """Number of slots for KV entries, beside those kept beyond the window."""
        return _slots(self.kv)

    def with_slots(self, s: int) -> MemoryState:
        """Return the same state with its KV entries in s slots (at least as many as are in use)."""
        return (
            self if s == _slots(self.kv) or not isinstance(self.kv, Held) else self._replace(kv=self.kv.with_slots(s))
        )

    def where(self, rows: Tensor, other: MemoryState) -> MemoryState:
        """Return this state in the rows that are True, Bool[b], and the other state in the remaining rows."""
        s = max(_slots(self.kv), _slots(other.kv))

        def choose(mine: Tensor, theirs: Tensor) -> Tensor:
            return torch.where(rows.view(-1, *[1] * (mine.dim() - 1)), mine, theirs)

        return pytree.tree_map(choose, self.with_slots(s), other.with_slots(s))

    def detach(self) -> MemoryState:
        """Detach all tensors from the autograd graph, for truncated back-propagation through time."""
        return self.map(Tensor.detach)

    def clone(self) -> MemoryState:
        """Copy all tensors. A fork does not need this, because calls never modify the given state."""
        return self.map(Tensor.clone)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> MemoryState:
        """Move the state to a device, and its KV entries to a dtype. Fast weights stay in at least float32."""

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
        """Return the size of one row of this state in bytes."""
        return sum(x.numel() * x.element_size() for x in self.leaves()) // max(len(self.position), 1)


def _slots(kv: Held | tuple[()]) -> int:
    """`MemoryState.slots` for code that is compiled: torch 2.9 cannot compile a property of a NamedTuple."""
    return kv.keys.shape[1] if isinstance(kv, Held) else 0


def leaves(tree: Tree) -> list[Any]:
    """Return the leaves of a tree. (torch's pytree takes ten times as long, a tenth of a small layer's step.)"""
    found: list[Any] = []
    for part in tree:
        if isinstance(part, tuple):
            found += leaves(part)
        else:
            found.append(part)
    return found


def named(tree: Tree, prefix: str = "") -> dict[str, Any]:
    """Return the leaves of a tree by name: fields of NamedTuples and indices of tuples, joined by dots."""
    if not isinstance(tree, tuple):
        return {prefix: tree}
    fields = getattr(tree, "_fields", range(len(tree)))
    before = f"{prefix}." if prefix else ""
    return {
        name: leaf
        for field, part in zip(fields, tree, strict=True)
        for name, leaf in named(part, f"{before}{field}").items()
    }
