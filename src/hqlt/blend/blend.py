"""A blend answers one question: when does a pair reach each memory? This file holds what all answers share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hqlt.memory import Candidates, FWMemory, Held, KVMemory, MemoryState, Retention, Tree
from hqlt.ops.heads import repeated
from hqlt.ops.segments import positions
from hqlt.registry import name_of
from hqlt.shapes import Keys, Positions, Queries, Resets, Values, is_symbolic


class Memories(NamedTuple):
    """A layer's two memories; None where it has one alone."""

    kv: KVMemory | None
    fw: FWMemory | None

    def both(self) -> tuple[KVMemory, FWMemory]:
        assert self.kv is not None and self.fw is not None, "the layer builds both"
        return self.kv, self.fw


class Reads(NamedTuple):
    """What the queries read from each memory, [b, t, h, v]; None from one that is not there."""

    fw: Values | None
    kv: Values | None

    def both(self) -> tuple[Values, Values]:
        """(fw, kv), where there are two memories."""
        assert self.fw is not None and self.kv is not None, "a mixer needs two memories"
        return self.fw, self.kv


class Tokens(NamedTuple):
    """What new tokens bring."""

    q: Queries  # [b, t, g·h, k]
    keys: Keys  # [b, t, h, k]
    values: Values  # [b, t, h, v]
    gates: Tree  # [b, t, …] each, the write rule's own


class Timeline(NamedTuple):
    """The pairs held from earlier calls, then the new ones: l = s + t."""

    keys: Keys  # [b, l, h, k]
    values: Values  # [b, l, h, v]
    gates: Tree  # [b, l, …] each; () for a blend that does not keep them
    position: Positions  # [b, l] of each pair's token in its segment, negative for an unused slot
    resets: Resets | None  # Bool [b, l], None where no segment begins after the timeline's first pair
    candidates: Candidates | tuple[()] = ()  # the same pairs and those kept beyond the window; () where none are


class Blend(nn.Module):
    """A schedule of both memories.

    It says three things: how many pairs must be held between calls (`slots`), how many of the latest pairs stay in the
    KV-memory after `count` tokens of a segment (`held`), and what each memory reads (`read`). Options are the
    keyword-only arguments of the constructor; a registered blend's are the layer's own.

    window: pairs that the KV-memory reaches, the own one included; None: all.
    """

    has_kv, has_fw = True, True
    """Which memories it blends."""
    needs_window = False
    """Whether there must be an end to what the KV-memory reaches."""
    keeps_gates = False
    """Whether a pair's own gates are held with it, because it is written later and with them."""
    native: str | None = None
    """What `hqlt.ops.step` calls what this blend writes, where it runs it; a subclass says so anew."""

    def __init__(self, window: int | None) -> None:
        super().__init__()
        if window is None and self.needs_window:
            name = name_of("blend", type(self))
            raise ValueError(f"window: expected a number of tokens, because {name} writes what leaves it, got None")
        if window is not None and window < 1:
            raise ValueError(f"window: expected at least 1 (the token itself) or None for all, got {window}")
        self.window = window

    @property
    def slots(self) -> int | None:
        """Pairs held between calls at most; None: all of them. Here: the next token brings the window's last pair."""
        return None if self.window is None else self.window - 1

    def check(self, fw: FWMemory) -> None:
        """Refuse, by a ValueError, a rule that has no meaning in this schedule."""

    def held(self, count: Tensor) -> Tensor:
        """How many of a segment's latest pairs the KV-memory holds on to after `count` tokens: [b]."""
        return count if self.slots is None else count.clamp(max=self.slots)

    def read(
        self, memories: Memories, new: Tokens, timeline: Timeline, past: Tree | None, resets: Resets | None
    ) -> tuple[Reads, Tree]:
        """What the new tokens' queries read from each memory, and the FW-memory's state after the last of them.

        past: the FW-memory's state before, None for an empty one. resets: Bool[b, t], of the new tokens.
        """
        raise NotImplementedError

    def forward(
        self, memories: Memories, new: Tokens, state: MemoryState | None, resets: Resets | None
    ) -> tuple[Reads, MemoryState]:
        timeline = self.timeline(new, state, resets)
        if memories.kv is not None and memories.kv.retention is not None:
            timeline = timeline._replace(candidates=self.candidates(memories.kv.retention, timeline, state))
        reads, fw = self.read(memories, new, timeline, None if state is None else state.fw, resets)
        own = None if memories.fw is None else memories.fw.skip(new.values)
        if own is not None and reads.fw is not None:
            reads = reads._replace(fw=reads.fw + repeated(new.q, own)[0])
        return reads, self.state_after(memories, timeline, fw)

    def timeline(self, new: Tokens, state: MemoryState | None, resets: Resets | None) -> Timeline:
        """The held pairs, and the new ones behind them."""
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

        def behind(held: Tensor, x: Tensor) -> Tensor:
            return torch.cat([held.to(x.dtype), x], dim=1)

        keys, values = behind(state.kv.keys, keys), behind(state.kv.values, values)
        return Timeline(keys, values, pytree.tree_map(behind, state.kv.gates, gates), position, position == 0)

    def leaves(self, position: Tensor) -> Tensor:
        """The position at which a pair leaves the window, from its own."""
        assert self.window is not None, "the layer refuses a retention that keeps more"
        return position + self.window

    def candidates(self, retention: Retention, timeline: Timeline, state: MemoryState | None) -> Candidates:
        """The timeline's pairs, behind those that the retention kept."""
        keys, values, _, position, _, _ = timeline
        past, count, used = None, torch.zeros_like(position[:, 0]), torch.zeros_like(position[:, 0])
        if state is not None and isinstance(state.kv, Held):
            past, count = state.kv.kept, state.position
            used = count - self.held(count)
            held = torch.arange(position.shape[1], device=position.device) < state.slots
            position = position.masked_fill(held & (position < used[:, None]), -1)  # of a slot that is unused
        return retention.candidates(keys, values, position, self.leaves(position), past, count, used)

    def attend(self, kv: KVMemory, q: Queries, timeline: Timeline) -> Values:
        """What the queries read from the KV-memory."""
        out: Values = kv(q, timeline.keys, timeline.values, self.window, timeline.resets, timeline.candidates)
        return out

    @staticmethod
    def alive(x: Tree, live: Tensor) -> Tree:
        """Zeros in place of what is not live, [b, t, …] each: whatever it held then reaches nobody."""
        return pytree.tree_map(lambda x: x.masked_fill(~live.view(*live.shape, *(1,) * (x.dim() - 2)), 0), x)

    def state_after(self, memories: Memories, timeline: Timeline, fw: Tree) -> MemoryState:
        """What to hold of the timeline, and the FW-memory after it."""
        keys, values, gates, position, _, candidates = timeline
        count = position[:, -1] + 1
        kv: Held | tuple[()] = ()
        if memories.kv is not None:
            recent_scores = candidates.scores[:, memories.kv.kept :] if candidates else ()
            kv = self.latest(Held(keys, values, gates, recent_scores), count)
            if candidates and memories.kv.retention is not None:
                used = count - self.held(count)
                kept = memories.kv.retention.after(candidates, kv.kept, used, self.leaves(used - 1))
                kv = kv._replace(kept=kept)
        return MemoryState(kv, fw, keys.new_zeros(keys.shape[0], 0, 0), count)

    def extra_repr(self) -> str:
        return f"window={self.window}"

    def latest(self, pairs: Held, count: Tensor) -> Held:
        """The latest pairs, zeros in unused slots. count: [b] tokens that each row's segment has."""
        l = pairs.keys.shape[1]
        s = l if self.slots is None else self.slots
        unused = torch.arange(s, 0, -1, device=count.device) > self.held(count)[:, None]  # [b, s]
        index = None
        if is_symbolic(l) or l < s:  # a slot before the first pair is unused, whatever is taken for it
            index = torch.arange(l - s, l, device=count.device).clamp(min=0)

        def latest(x: Tensor) -> Tensor:
            x = x[:, l - s :] if index is None else x.index_select(1, index)
            return x.masked_fill(unused.view(*unused.shape, *(1,) * (x.dim() - 2)), 0)

        kept: Held = pytree.tree_map(latest, pairs)
        return kept
