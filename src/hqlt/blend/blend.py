"""A blend answers one question: when does a token reach each memory? This file holds what all answers share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from hqlt.memory import FastWeights, FWMemory, KVMemory, MemoryState
from hqlt.ops.segments import positions
from hqlt.shapes import Keys, Positions, Queries, Resets, Strengths, Values, at_least_float32, is_symbolic


class Reads(NamedTuple):
    """What the queries read from each memory, [b, t, h, v]; None from one that is not there."""

    fw: Values | None
    kv: Values | None

    def both(self) -> tuple[Values, Values]:
        """(fw, kv), where there are two memories."""
        assert self.fw is not None and self.kv is not None, "a mixer needs two memories"
        return self.fw, self.kv


class Timeline(NamedTuple):
    """The pairs held from earlier calls, then the new ones: l = s + t."""

    keys: Keys  # [b, l, h, k]
    values: Values  # [b, l, h, v]
    betas: Strengths  # [b, l, h], or [b, l, 0] for a blend that does not keep them
    position: Positions  # [b, l] of each pair's token in its segment, negative for an unused slot
    resets: Resets | None  # Bool [b, l], None where no segment begins after the timeline's first pair


class Blend(nn.Module):
    """The KV-memory, the FW-memory and their schedule.

    A schedule says three things: how many pairs it must hold between calls (`slots`), how many of the latest pairs
    stay in the KV-memory after `count` tokens of a segment (`held`), and what each memory reads (`read`).
    """

    keeps_betas = False
    """Whether a pair's write strength is held with it, because the pair is written later with its own."""

    def __init__(self, kv: KVMemory | None, fw: FWMemory | None) -> None:
        super().__init__()
        self.kv = kv
        self.fw = fw

    @property
    def slots(self) -> int | None:
        """Pairs held between calls at most; None: all of them."""
        raise NotImplementedError

    def held(self, count: Tensor) -> Tensor:
        """How many of a segment's latest pairs the KV-memory holds on to after `count` tokens: [b]."""
        raise NotImplementedError

    def read(
        self,
        q: Queries,
        beta: Strengths,
        timeline: Timeline,
        past: FastWeights | None,
        resets: Resets | None,
    ) -> tuple[Reads, FastWeights | None]:
        """What the new tokens' queries read from each memory, and the FW-memory after the last of them."""
        raise NotImplementedError

    def forward(
        self, q: Queries, k: Keys, v: Values, beta: Strengths, state: MemoryState | None, resets: Resets | None
    ) -> tuple[Reads, MemoryState]:
        timeline = self.timeline(k, v, beta, state, resets)
        past = None if state is None else FastWeights(state.fast_weights, state.key_sum)
        reads, fast_weights = self.read(q, beta, timeline, past, resets)
        return reads, self.state_after(timeline, fast_weights)

    def timeline(
        self, k: Keys, v: Values, beta: Strengths, state: MemoryState | None, resets: Resets | None
    ) -> Timeline:
        """The held pairs, and the new ones behind them."""
        b, t = k.shape[:2]
        if not self.keeps_betas:
            beta = beta[..., :0]
        if state is None:
            start = torch.zeros(b, dtype=torch.long, device=k.device)
            return Timeline(k, v, beta, positions(resets, start, t), resets)
        s = state.keys.shape[1]
        age = torch.arange(s, 0, -1, device=k.device)
        position = torch.cat([state.position[:, None] - age, positions(resets, state.position, t)], dim=1)
        return Timeline(
            torch.cat([state.keys.to(k.dtype), k], dim=1),
            torch.cat([state.values.to(v.dtype), v], dim=1),
            torch.cat([state.betas.to(beta.dtype), beta], dim=1),
            position,
            position == 0,
        )

    def state_after(self, timeline: Timeline, fast_weights: FastWeights | None) -> MemoryState:
        """What to hold of the timeline, and the FW-memory after it."""
        b, l, _, k = timeline.keys.shape
        s = l if self.slots is None else self.slots
        count = timeline.position[:, -1] + 1
        unused = (torch.arange(s, 0, -1, device=count.device) > self.held(count)[:, None])[..., None]  # [b, s, 1]

        index = None
        if is_symbolic(l) or l < s:  # a slot before the first pair is unused, whatever is taken for it
            index = torch.arange(l - s, l, device=count.device).clamp(min=0)

        def latest(x: Tensor, unused: Tensor) -> Tensor:
            x = x[:, l - s :] if index is None else x.index_select(1, index)
            return x.masked_fill(unused, 0)

        if fast_weights is None:
            v = timeline.values
            nothing = v.new_zeros(b, 0, k, v.shape[-1], dtype=at_least_float32(v.dtype))
            fast_weights = FastWeights(nothing, nothing[..., 0, :0])
        return MemoryState(
            keys=latest(timeline.keys, unused[..., None]),
            values=latest(timeline.values, unused[..., None]),
            betas=latest(timeline.betas, unused),
            fast_weights=fast_weights.matrix,
            key_sum=fast_weights.key_sum,
            position=count,
            convolution=timeline.keys.new_zeros(b, 0, 0),
        )
