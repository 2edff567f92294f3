"""A blend."""

from __future__ import annotations

import torch.nn.functional as F
from torch.utils._pytree import tree_map

import hqlt
from hqlt.blend import Blend
from hqlt.memory import Write


@hqlt.register("blend", "one-behind")
class OneBehind(Blend):
    """The KV-memory holds tokens t−S+1 … t; the FW-memory 1 … t−1: a pair is written one token late, as itself."""

    keeps_gates = needs_window = True

    @property
    def slots(self) -> int:
        return max(self.window - 1, 1)

    def held_count(self, count):
        return count.clamp(max=self.slots)

    def scan(self, fw, new, timeline, past, resets):
        t = new.q.shape[1]
        before = timeline.position[:, -t:] > 0  # there is a token before, of the same segment

        def earlier(x):
            return F.pad(x, (*(0, 0) * (x.dim() - 2), 1, 0))[:, -t - 1 : -1]

        write = Write(*self.zero_not_live(tree_map(earlier, timeline[:3]), before), before)
        return fw(new.q, write, past, resets)
