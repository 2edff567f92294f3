"""Rollback: earlier states of a model, and the inputs that it has read since."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from hqlt.memory import MemoryState
from hqlt.shapes import Hidden, Resets

ASSISTED = 256
"""Rollback in transformers' assisted generation, which does not say how many tokens it needs."""


class Snapshot(NamedTuple):
    """The states of a model, one per layer, after `seen` columns; () before the first."""

    seen: int
    states: tuple[MemoryState, ...]


class Columns(NamedTuple):
    """The inputs of one call: embeddings x [b, t, d], and resets, Bool[b, t], where segments begin."""

    x: Hidden
    resets: Resets

    @classmethod
    def of(cls, x: Hidden, resets: Resets | None) -> Columns:
        return cls(x.detach(), x.new_zeros(x.shape[:2], dtype=torch.bool) if resets is None else resets)


@dataclass(frozen=True)
class History:
    """Snapshots and inputs from which any of the last `rollback` columns can be restored.

    A snapshot holds the states after an earlier call. The ages of the snapshots grow by powers of two, so about
    2·log₂(rollback) are kept, and removing m columns reads at most m columns again, or those of one call. Neither cost
    nor memory depends on the length of the context.
    """

    rollback: int
    """Maximum number of columns that can be removed."""
    snapshots: tuple[Snapshot, ...]
    """Oldest first; the last one is the present."""
    columns: tuple[Columns, ...] = ()
    """Inputs of the calls after the oldest snapshot."""

    @property
    def seen(self) -> int:
        """Number of columns read so far."""
        return self.snapshots[-1].seen

    def available(self) -> int:
        """Number of columns that can be removed now."""
        return min(self.rollback, self.seen - self.snapshots[0].seen)

    def appended(self, states: tuple[MemoryState, ...], columns: Columns) -> History:
        """The history after one more call."""
        present = Snapshot(self.seen + columns.x.shape[1], states)
        kept = [present]
        for i, snapshot in reversed([*enumerate(self.snapshots)]):
            newer = present.seen - kept[-1].seen
            if newer >= self.rollback:
                break  # older than any rollback
            older = present.seen - self.snapshots[i - 1].seen if i else None
            if older is None or older > 2 * newer or len(kept) == 1:
                kept.append(snapshot)
        return replace(self, snapshots=tuple(reversed(kept)), columns=(*self.columns, columns))._trimmed()

    def _trimmed(self) -> History:
        """Drop the calls before the oldest snapshot. Snapshots lie between calls."""
        length, columns = sum(part.x.shape[1] for part in self.columns), list(self.columns)
        while columns and length > self.seen - self.snapshots[0].seen:
            length -= columns.pop(0).x.shape[1]
        return replace(self, columns=tuple(columns))

    def rolled_back(self, columns: int) -> tuple[History, Columns | None]:
        """The history at the newest snapshot that is at least `columns` old, and the inputs to read again from there.

        Reading those inputs leads to the state `columns` ago; None if the snapshot is that state.
        """
        target = self.seen - columns
        snapshots = tuple(snapshot for snapshot in self.snapshots if snapshot.seen <= target)
        past = replace(self, snapshots=snapshots, columns=())
        before: list[Columns] = []
        unread: list[Columns] = []
        at, begin = self.snapshots[0].seen, past.seen
        for part in self.columns:
            at += part.x.shape[1]
            (before if at <= begin else unread).append(part)
        past = replace(past, columns=tuple(before))
        if target == begin:
            return past, None
        x, resets = (torch.cat(parts, dim=1)[:, : target - begin] for parts in zip(*unread, strict=True))
        return past, Columns(x, resets)

    def map(self, states: Callable[[MemoryState], MemoryState], rows: Callable[[Tensor], Tensor]) -> History:
        """Apply the same row operation to all states and to all inputs."""
        return replace(
            self,
            snapshots=tuple(Snapshot(seen, tuple(map(states, layers))) for seen, layers in self.snapshots),
            columns=tuple(Columns(*map(rows, part)) for part in self.columns),
        )
