"""The base class of blends, which decide when a token reaches each memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hqlt.memory import Candidates, Errors, FWMemory, Held, Kept, KVMemory, MemoryState, Tree
from hqlt.memory.kv import kept
from hqlt.native import is_traced
from hqlt.ops.heads import repeated
from hqlt.ops.segments import positions
from hqlt.registry import name_of
from hqlt.shapes import Keys, Positions, Queries, Resets, Values, is_symbolic


class Memories(NamedTuple):
    """The memories of a layer."""

    kv: KVMemory | None
    """None for "fw-only"."""
    fw: FWMemory | None
    """None for "kv-only"."""

    def both(self) -> tuple[KVMemory, FWMemory]:
        """Return (kv, fw) of a layer with two memories."""
        assert self.kv is not None and self.fw is not None, "the layer builds both"
        return self.kv, self.fw


class Reads(NamedTuple):
    """What the queries read from each memory."""

    fw: Values | None
    """[b, t, heads, v]; None without an FW-memory."""
    kv: Values | None
    """[b, t, heads, v]; None without a KV-memory."""

    def both(self) -> tuple[Values, Values]:
        """Return (fw, kv) of a layer with two memories."""
        assert self.fw is not None and self.kv is not None, "a mixer needs two memories"
        return self.fw, self.kv


class Tokens(NamedTuple):
    """The projections of new tokens."""

    q: Queries  # [b, t, g·h, k]
    keys: Keys  # [b, t, h, k]
    values: Values  # [b, t, h, v]
    gates: Tree  # [b, t, …] each, of the write rule


class Timeline(NamedTuple):
    """The KV entries held from earlier calls, then the new ones: l = s + t."""

    keys: Keys  # [b, l, h, k]
    values: Values  # [b, l, h, v]
    gates: Tree  # [b, l, …] each; () unless the blend keeps gates
    position: Positions  # [b, l] in the segment; negative for an unused slot
    resets: Resets | None  # Bool[b, l]; None if no segment begins after the first entry


class Blend(nn.Module):
    """Base class of blends: the schedule by which tokens reach the two memories.

    A subclass defines how many KV entries are held between calls (`slots`), how many of the latest entries are held
    after `count` tokens of a segment (`held_count`), and when an entry is written to the FW-memory (`scan`). Its
    options are the keyword-only arguments of its constructor; once it is registered, they are options of the layer.

    Args:
        window (tokens): number of latest tokens that the KV-memory attends to, the current one included. None: all.

    Raises:
        ValueError: when the blend cannot have this window.
    """

    has_kv, has_fw = True, True
    """Which memories the layer has."""
    needs_window = False
    """Whether the window must be a number."""
    keeps_gates = False
    """Whether the gates of a token are held with its KV entry, because it is written later with its own gates."""
    writes_on_arrival = False
    """Whether a token is written when it arrives, so that the FW-memory's prediction error is known then. `scan` then
    accepts errors=True and also returns the errors."""
    native: str | None = None
    """Name of this blend's writes in `hqlt.ops.step`, if it supports them; not inherited by subclasses."""

    def __init__(self, window: int | None) -> None:
        super().__init__()
        self.window = self.valid_window(window)

    def valid_window(self, window: int | None) -> int | None:
        """Return the window, or raise a ValueError if this blend cannot have it."""
        if window is None and self.needs_window:
            name = name_of("blend", type(self))
            raise ValueError(
                f"window: expected a number of tokens, because {name} writes tokens that leave it, got None"
            )
        if window is not None and window < 1:
            raise ValueError(f"window: expected at least 1 (the token itself) or None for all, got {window}")
        return window

    @property
    def slots(self) -> int | None:
        """Number of KV entries held between calls (None: all). By default window − 1: a new token completes it."""
        return None if self.window is None else self.window - 1

    def check(self, memories: Memories) -> None:
        """Raise a ValueError if the write rule or the retention does not work with this blend."""
        kv, fw = memories
        if kv is None or kv.retention is None or not kv.retention.needs_errors:
            return
        name = name_of("retention", type(kv.retention))
        if not self.writes_on_arrival:
            raise ValueError(
                f"retention: expected one that does not score by the FW-memory's errors (retention='value-norm'), or a "
                f"blend that writes a token when it arrives (blend='synchronous'), got {name!r}"
            )
        if fw is not None and not fw.returns_errors:
            raise ValueError(
                f"retention: expected one that does not score by the FW-memory's errors (retention='value-norm'), "
                f"because fast_weights={name_of('rule', type(fw))!r} writes without a prediction, got {name!r}"
            )

    def held_count(self, count: Tensor) -> Tensor:
        """Return how many of the latest KV entries are held after `count` tokens of a segment: [b]."""
        return count if self.slots is None else count.clamp(max=self.slots)

    def scan(
        self, fw: FWMemory, new: Tokens, timeline: Timeline, past: Tree | None, resets: Resets | None
    ) -> tuple[Any, ...]:
        """Write to the FW-memory and read it.

        Args:
            fw: the FW-memory.
            new: the new tokens.
            timeline: the held KV entries and the new ones.
            past: the state of the FW-memory before the new tokens; None if it is empty.
            resets (Bool[b, t]): where the new tokens begin a segment.

        Returns:
            The read [b, t, heads, v], the state after the last token, and `Errors` if asked for
            (`writes_on_arrival`).
        """
        raise NotImplementedError

    def kv_resets(self, timeline: Timeline) -> Resets | None:
        """Return where the entries visible to the KV-memory restart, besides the window: Bool[b, l]."""
        return timeline.resets

    def forward(
        self, memories: Memories, new: Tokens, state: MemoryState | None, resets: Resets | None
    ) -> tuple[Reads, MemoryState]:
        (kv, fw), timeline = memories, self.timeline(new, state, resets)
        fw_read, kv_read, candidates = None, None, None
        fw_after: Tree = ()
        errors: list[Errors] = []
        if fw is not None:
            wants = {"errors": True} if kv is not None and kv.retention and kv.retention.needs_errors else {}
            past = None if state is None else state.fw
            fw_read, fw_after, *errors = self.scan(fw, new, timeline, past, resets, **wants)
            if (own := fw.skip(new.values)) is not None:
                fw_read = fw_read + repeated(new.q, own)[0]
        if kv is not None:
            keys, values, marks = timeline.keys, timeline.values, self.kv_resets(timeline)
            candidates = self.candidates(kv, new, timeline, state, errors[0] if errors else None)
            kv_read = kv(new.q, keys, values, self.window, marks, *([] if candidates is None else [candidates]))
        return Reads(fw_read, kv_read), self.state_after(memories, timeline, fw_after, candidates)

    if TYPE_CHECKING:
        __call__ = forward

    def timeline(self, new: Tokens, state: MemoryState | None, resets: Resets | None) -> Timeline:
        """Return the held KV entries followed by the new ones."""
        _, keys, values, gates = new
        if not self.keeps_gates:
            gates = ()
        b, t = keys.shape[:2]
        if state is None:
            start = torch.zeros(b, dtype=torch.long, device=keys.device)
            return Timeline(keys, values, gates, positions(resets, start, t), resets)
        if not isinstance(state.kv, Held):
            return Timeline(keys, values, gates, positions(resets, state.position, t), resets)
        s = state.slots
        age = torch.arange(s, 0, -1, device=keys.device)
        position = torch.cat([state.position[:, None] - age, positions(resets, state.position, t)], dim=1)

        def append(held: Tensor, x: Tensor) -> Tensor:
            return torch.cat([held.to(x.dtype), x], dim=1)

        keys, values = append(state.kv.keys, keys), append(state.kv.values, values)
        return Timeline(keys, values, pytree.tree_map(append, state.kv.gates, gates), position, position == 0)

    def leave_position(self, position: Tensor) -> Tensor:
        """Return the position at which the entry at `position` leaves the window."""
        assert self.window is not None, "the layer rejects a retention without a window"
        return position + self.window

    def candidates(
        self, kv: KVMemory, new: Tokens, timeline: Timeline, state: MemoryState | None, errors: Errors | None
    ) -> Candidates | None:
        """Return the kept entries followed by the timeline; None if nothing is kept beyond the window."""
        if not kv.kept:
            return None
        keys, values, _, position, resets = timeline
        count = torch.zeros_like(position[:, 0]) if state is None else state.position
        past: Kept | None = state.kv.kept if state is not None and isinstance(state.kv, Held) else None
        known = kept.Timeline(
            keys, values, position, resets, self.leave_position(position), count, count - self.held_count(count)
        )
        return kv.candidates(known, new.q.shape[1], past, errors)

    @staticmethod
    def zero_not_live(x: Tree, live: Tensor) -> Tree:
        """Set tensors [b, t, …] to zero where a token is not live, so that their contents (even NaN) have no effect."""
        return pytree.tree_map(lambda x: x.masked_fill(~live.view(*live.shape, *(1,) * (x.dim() - 2)), 0), x)

    def state_after(
        self, memories: Memories, timeline: Timeline, fw: Tree, candidates: Candidates | None = None
    ) -> MemoryState:
        """Return the state after the timeline, given the state of the FW-memory."""
        keys, values, gates, position, _ = timeline
        count, l = position[:, -1] + 1, keys.shape[1]
        held: Held | tuple[()] = ()
        if memories.kv is not None:
            scores = () if candidates is None else candidates.scores[:, candidates.scores.shape[1] - l :]
            held = self.latest_entries(Held(keys, values, gates, scores), count)
        if memories.kv is not None and candidates is not None and isinstance(held, Held):
            used = count - self.held_count(count)
            begin = candidates.scores.shape[1] - count  # index of the current segment's first token
            after = memories.kv.kept_after(candidates, held.kept, begin + used, begin + self.leave_position(used - 1))
            held = held._replace(kept=after)
        return MemoryState(held, fw, keys.new_zeros(keys.shape[0], 0, 0), count)

    @staticmethod
    def is_known_false(condition: Tensor) -> bool:
        """Return whether a condition is known to be False. Nothing is known while tracing: the general path applies."""
        unknown = is_traced() or condition.is_meta or type(condition) is not Tensor
        return not unknown and not condition

    def extra_repr(self) -> str:
        return f"window={self.window}"

    def latest_entries(self, entries: Held, count: Tensor) -> Held:
        """Return the entries to hold after `count` [b] tokens of each row's segment, with zeros in unused slots."""
        l = entries.keys.shape[1]
        s = l if self.slots is None else self.slots
        unused = torch.arange(s, 0, -1, device=count.device) > self.held_count(count)[:, None]  # [b, s]
        index = None
        if is_symbolic(l) or l < s:  # slots before the first entry are unused, whatever they are filled with
            index = torch.arange(l - s, l, device=count.device).clamp(min=0)
        elif l == s and count.device.type == "cpu" and self.is_known_false(unused.any()):
            return entries  # full attention: nothing to copy

        def latest(x: Tensor) -> Tensor:
            x = x[:, l - s :] if index is None else x.index_select(1, index)
            return x.masked_fill(unused.view(*unused.shape, *(1,) * (x.dim() - 2)), 0)

        kept: Held = pytree.tree_map(latest, entries)
        return kept
