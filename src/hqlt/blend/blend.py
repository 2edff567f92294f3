"""A blend answers one question: when does a pair reach each memory? This file holds what all answers share."""

from __future__ import annotations

from typing import Any, NamedTuple

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


class Blend(nn.Module):
    """A schedule of both memories.

    It says how many pairs must be held between calls (`slots`), how many of the latest pairs stay in the KV-memory
    after `count` tokens of a segment (`held`), and which pair reaches the FW-memory when (`scan`). Options are the
    keyword-only arguments of the constructor; a registered blend's are the layer's own.

    window: pairs that the KV-memory reaches, the own one included; None: all.
    """

    has_kv, has_fw = True, True
    """Which memories it blends."""
    needs_window = False
    """Whether there must be an end to what the KV-memory reaches."""
    keeps_gates = False
    """Whether a pair's own gates are held with it, because it is written later and with them."""
    writes_on_arrival = False
    """Whether a pair is written when it arrives, so that what the FW-memory predicted of it is known then. `scan` then
    takes errors=True and returns them, too."""
    native: str | None = None
    """What `hqlt.ops.step` calls what this blend writes, where it runs it; a subclass says so anew."""

    def __init__(self, window: int | None) -> None:
        super().__init__()
        self.window = self.valid_window(window)

    def valid_window(self, window: int | None) -> int | None:
        """A window that serves; ValueError for another."""
        if window is None and self.needs_window:
            name = name_of("blend", type(self))
            raise ValueError(f"window: expected a number of tokens, because {name} writes what leaves it, got None")
        if window is not None and window < 1:
            raise ValueError(f"window: expected at least 1 (the token itself) or None for all, got {window}")
        return window

    @property
    def slots(self) -> int | None:
        """Pairs held between calls at most; None: all of them. Here: the next token brings the window's last pair."""
        return None if self.window is None else self.window - 1

    def check(self, memories: Memories) -> None:
        """Refuse, by a ValueError, a rule or a retention that has no meaning in this schedule."""
        kv, fw = memories
        if kv is None or kv.retention is None or not kv.retention.needs_errors:
            return
        name = name_of("retention", type(kv.retention))
        if not self.writes_on_arrival:
            raise ValueError(
                f"retention: expected one whose scores do not ask for the FW-memory's errors, or a blend that writes a "
                f"pair when it arrives (blend='synchronous'), got {name!r}: here its error is not known by then"
            )
        if fw is not None and not fw.returns_errors:
            raise ValueError(
                f"retention: expected one whose scores do not ask for the FW-memory's errors (retention='value-norm'), "
                f"because fast_weights={name_of('rule', type(fw))!r} predicts nothing when it writes, got {name!r}"
            )

    def held_count(self, count: Tensor) -> Tensor:
        """How many of a segment's latest pairs the KV-memory holds on to after `count` tokens: [b]."""
        return count if self.slots is None else count.clamp(max=self.slots)

    def scan(
        self, fw: FWMemory, new: Tokens, timeline: Timeline, past: Tree | None, resets: Resets | None
    ) -> tuple[Any, ...]:
        """What the new tokens' queries read from the FW-memory, its state after the last of them (and `Errors`, see
        `writes_on_arrival`).

        past: its state before, None for an empty one. resets: Bool[b, t], of the new tokens.
        """
        raise NotImplementedError

    def kv_resets(self, timeline: Timeline) -> Resets | None:
        """Where what the KV-memory reaches begins anew, within the latest `window` pairs: Bool[b, l]."""
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

    def leave_position(self, position: Tensor) -> Tensor:
        """The position at which a pair leaves the window, from its own."""
        assert self.window is not None, "the layer refuses a retention that keeps more"
        return position + self.window

    def candidates(
        self, kv: KVMemory, new: Tokens, timeline: Timeline, state: MemoryState | None, errors: Errors | None
    ) -> Candidates | None:
        """The timeline's pairs behind those that were kept; None where nothing is kept beyond the window."""
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
        """Zeros in place of what is not live, [b, t, …] each: whatever it held then reaches nobody."""
        return pytree.tree_map(lambda x: x.masked_fill(~live.view(*live.shape, *(1,) * (x.dim() - 2)), 0), x)

    def state_after(
        self, memories: Memories, timeline: Timeline, fw: Tree, candidates: Candidates | None = None
    ) -> MemoryState:
        """What to hold of the timeline, and the FW-memory after it."""
        keys, values, gates, position, _ = timeline
        count, l = position[:, -1] + 1, keys.shape[1]
        held: Held | tuple[()] = ()
        if memories.kv is not None:
            scores = () if candidates is None else candidates.scores[:, candidates.scores.shape[1] - l :]
            held = self.latest_entries(Held(keys, values, gates, scores), count)
        if memories.kv is not None and candidates is not None and isinstance(held, Held):
            used = count - self.held_count(count)
            begin = candidates.scores.shape[1] - count  # of the running segment, as an index
            after = memories.kv.kept_after(candidates, held.kept, begin + used, begin + self.leave_position(used - 1))
            held = held._replace(kept=after)
        return MemoryState(held, fw, keys.new_zeros(keys.shape[0], 0, 0), count)

    @staticmethod
    def is_known_false(condition: Tensor) -> bool:
        """Whether it is known not to hold. While traced nobody knows, and the general way is always right."""
        unknown = is_traced() or condition.is_meta or type(condition) is not Tensor
        return not unknown and not condition

    def extra_repr(self) -> str:
        return f"window={self.window}"

    def latest_entries(self, pairs: Held, count: Tensor) -> Held:
        """The latest pairs, zeros in unused slots. count: [b] tokens that each row's segment has."""
        l = pairs.keys.shape[1]
        s = l if self.slots is None else self.slots
        unused = torch.arange(s, 0, -1, device=count.device) > self.held_count(count)[:, None]  # [b, s]
        index = None
        if is_symbolic(l) or l < s:  # a slot before the first pair is unused, whatever is taken for it
            index = torch.arange(l - s, l, device=count.device).clamp(min=0)
        elif l == s and count.device.type == "cpu" and self.is_known_false(unused.any()):
            return pairs  # full attention, a token further: nothing to copy

        def latest(x: Tensor) -> Tensor:
            x = x[:, l - s :] if index is None else x.index_select(1, index)
            return x.masked_fill(unused.view(*unused.shape, *(1,) * (x.dim() - 2)), 0)

        kept: Held = pytree.tree_map(latest, pairs)
        return kept
