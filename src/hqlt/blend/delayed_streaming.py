"""Delayed-Streaming: a token goes to the FW-memory in the moment in which it leaves the KV-memory."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from hqlt.blend.blend import Blend, Reads, Timeline
from hqlt.memory import FastWeights, FWMemory, KVMemory
from hqlt.shapes import Queries, Resets, Strengths


class DelayedStreaming(Blend):
    """At step t the KV-memory holds tokens t−S+1 … t and the FW-memory 1 … t−S: each past token is in exactly one.

    The pair of token t−S falls out of the window at step t, is written with the current β_t, and then the FW-memory is
    read.

    Source: the paper, section 3, "Delayed-Streaming blending".
    """

    kv: KVMemory
    fw: FWMemory

    @property
    def slots(self) -> int:
        assert self.kv.window is not None, "the layer refuses it"
        return self.kv.window

    def held(self, count: Tensor) -> Tensor:
        return count.clamp(max=self.slots)

    def read(
        self,
        q: Queries,
        beta: Strengths,
        timeline: Timeline,
        past: FastWeights | None,
        resets: Resets | None,
    ) -> tuple[Reads, FastWeights]:
        t, l = q.shape[1], timeline.keys.shape[1]

        not_there = (timeline.position[:, -t:] < self.slots)[..., None]  # token t−S is of another segment, or none

        def falling_out(x: Tensor) -> Tensor:
            """What token t−S had, for each new token t; zeros where it is not there."""
            x = F.pad(x, (0, 0, 0, 0, self.slots - (l - t), 0))[:, :t]
            return x if timeline.resets is None else x.masked_fill(not_there[..., None], 0)

        fw, fast_weights = self.fw(
            self.fw.features(q),
            self.fw.features(falling_out(timeline.keys)),
            falling_out(timeline.values),
            beta.masked_fill(not_there, 0),
            past,
            resets,
        )
        return Reads(fw, self.kv(q, timeline.keys, timeline.values, timeline.resets)), fast_weights
