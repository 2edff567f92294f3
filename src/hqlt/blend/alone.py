"""One memory alone, from the same parts: the baselines."""

from __future__ import annotations

import torch
from torch import Tensor

from hqlt.blend.blend import Blend, Reads, Timeline
from hqlt.memory import FastWeights, FWMemory, KVMemory
from hqlt.shapes import Queries, Resets, Strengths


class KVOnly(Blend):
    """Softmax attention alone, over a window or (window None) over everything: a transformer's layer."""

    kv: KVMemory

    @property
    def slots(self) -> int | None:
        return None if self.kv.window is None else self.kv.window - 1

    def held(self, count: Tensor) -> Tensor:
        return count if self.slots is None else count.clamp(max=self.slots)

    def read(
        self,
        q: Queries,
        beta: Strengths,
        timeline: Timeline,
        past: FastWeights | None,
        resets: Resets | None,
    ) -> tuple[Reads, None]:
        return Reads(None, self.kv(q, timeline.keys, timeline.values, timeline.resets)), None


class FWOnly(Blend):
    """Fast weights alone: DeltaNet, or with the additive rule a linear transformer."""

    fw: FWMemory

    @property
    def slots(self) -> int:
        return 0

    def held(self, count: Tensor) -> Tensor:
        return torch.zeros_like(count)

    def read(
        self,
        q: Queries,
        beta: Strengths,
        timeline: Timeline,
        past: FastWeights | None,
        resets: Resets | None,
    ) -> tuple[Reads, FastWeights]:
        fw, fast_weights = self.fw(
            self.fw.features(q), self.fw.features(timeline.keys), timeline.values, beta, past, resets
        )
        return Reads(fw, None), fast_weights
