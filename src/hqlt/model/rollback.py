"""Taking tokens back: earlier states of a model, and what it has read since."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from hqlt.memory import MemoryState
from hqlt.shapes import Hidden, Resets

ASSISTED = 256
"""Tokens that can be taken back in transformers' assisted generation, which does not say how many it needs."""


class Snapshot(NamedTuple):
    """States of a model, one a layer, after `seen` columns; () before the first."""

    seen: int
    states: tuple[MemoryState, ...]


class Columns(NamedTuple):
    """What one call was given: x [b, t, d], embedded, and where resets mark a segment's beginning, Bool[b, t]."""

    x: Hidden
    resets: Resets

    @classmethod
    def of(cls, x: Hidden, resets: Resets | None) -> Columns:
        return cls(x.detach(), x.new_zeros(x.shape[:2], dtype=torch.bool) if resets is None else resets)


@dataclass(frozen=True)
class History:
    """Enough of the past to return to any of the last `rollback` columns: an earlier state, and the inputs since.

    Snapshots are the states after earlier calls: values, which cost nothing to keep but their memory. Seen from the
    present their ages grow by powers of two, so some 2·log₂(rollback) are kept, and to take m columns back, at most m
    columns are read again, or those of one call. None of it depends on the length of the context.
    """

    rollback: int
    snapshots: tuple[Snapshot, ...]
    """The oldest first; the last is the present."""
    columns: tuple[Columns, ...] = ()
    """The calls after the oldest snapshot."""

    @property
    def seen(self) -> int:
        return self.snapshots[-1].seen

    def most(self) -> int:
        """How many columns can be taken back now."""
        return min(self.rollback, self.seen - self.snapshots[0].seen)

    def after(self, states: tuple[MemoryState, ...], columns: Columns) -> History:
        """The history after one more call."""
        present = Snapshot(self.seen + columns.x.shape[1], states)
        kept = [present]
        for i, snapshot in reversed([*enumerate(self.snapshots)]):
            newer = present.seen - kept[-1].seen
            if newer >= self.rollback:
                break  # nothing as old as this is ever asked for
            older = present.seen - self.snapshots[i - 1].seen if i else None
            if older is None or older > 2 * newer or len(kept) == 1:
                kept.append(snapshot)
        return replace(self, snapshots=tuple(reversed(kept)), columns=(*self.columns, columns))._trimmed()

    def _trimmed(self) -> History:
        """Without the calls before the oldest snapshot. (Snapshots lie between calls.)"""
        length, columns = sum(part.x.shape[1] for part in self.columns), list(self.columns)
        while columns and length > self.seen - self.snapshots[0].seen:
            length -= columns.pop(0).x.shape[1]
        return replace(self, columns=tuple(columns))

    def back(self, columns: int) -> tuple[History, Columns | None]:
        """The history at the newest snapshot from which the place `columns` ago is reached by reading, and what."""
        place = self.seen - columns
        snapshots = tuple(snapshot for snapshot in self.snapshots if snapshot.seen <= place)
        past = replace(self, snapshots=snapshots, columns=())
        before: list[Columns] = []
        again: list[Columns] = []
        at, begin = self.snapshots[0].seen, past.seen
        for part in self.columns:
            at += part.x.shape[1]
            (before if at <= begin else again).append(part)
        past = replace(past, columns=tuple(before))
        if place == begin:
            return past, None
        x, resets = (torch.cat(parts, dim=1)[:, : place - begin] for parts in zip(*again, strict=True))
        return past, Columns(x, resets)

    def map(self, states: Callable[[MemoryState], MemoryState], rows: Callable[[Tensor], Tensor]) -> History:
        """The same change to the rows of all states, and of all that was read."""
        return replace(
            self,
            snapshots=tuple(Snapshot(seen, tuple(map(states, layers))) for seen, layers in self.snapshots),
            columns=tuple(Columns(*map(rows, part)) for part in self.columns),
        )
