"""Synchronous: a token goes to both memories at once."""

from __future__ import annotations

from torch import Tensor

from hqlt.blend.blend import Blend, Reads, Timeline
from hqlt.memory import FastWeights, FWMemory, KVMemory
from hqlt.shapes import Queries, Resets, Strengths


class Synchronous(Blend):
    """At step t the KV-memory holds tokens t−S+1 … t and the FW-memory 1 … t, written before it is read.

    Source: the paper, section 3, "Synchronous blending".
    """

    kv: KVMemory
    fw: FWMemory

    @property
    def slots(self) -> int | None:
        return None if self.kv.window is None else self.kv.window - 1  # the next token brings the window's last pair

    def held(self, count: Tensor) -> Tensor:
        return count if self.slots is None else count.clamp(max=self.slots)

    def read(
        self,
        q: Queries,
        beta: Strengths,
        timeline: Timeline,
        past: FastWeights | None,
        resets: Resets | None,
    ) -> tuple[Reads, FastWeights]:
        t = q.shape[1]
        new_keys, new_values = timeline.keys[:, -t:], timeline.values[:, -t:]
        fw, fast_weights = self.fw(self.fw.features(q), self.fw.features(new_keys), new_values, beta, past, resets)
        return Reads(fw, self.kv(q, timeline.keys, timeline.values, timeline.resets)), fast_weights
