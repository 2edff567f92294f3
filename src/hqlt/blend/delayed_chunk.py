"""Delayed-Chunk: tokens gather in the KV-memory; a whole chunk goes to the FW-memory when the next one begins."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hqlt.blend.blend import Blend, Reads, Timeline
from hqlt.memory import FastWeights, FWMemory, KVMemory
from hqlt.native import is_traced
from hqlt.shapes import Keys, Queries, Resets, Strengths, Values, is_symbolic


class DelayedChunk(Blend):
    """At step t the KV-memory holds t's chunk of S tokens up to t, and the FW-memory all earlier chunks.

    Chunks are counted from the start of a segment, whatever pieces it comes in. Each pair is written with its own β,
    when the first token of the next chunk arrives. Reads and writes are therefore put in the order in which they
    happen, for each row: a chunk's reads first, then its writes (time runs to the right, S = 2).

        tokens      0   1   2   3   4
        events    r0 r1 w0 w1 r2 r3 w2 w3 r4        w4 waits in the KV-memory

    A read is an event that writes with strength 0; what a writing event reads is dropped. Any scan serves unchanged.

    Source: the paper, section 3, "Delayed-Chunk blending"; Munkhdalai et al. 2024, "Infini-attention".
    """

    kv: KVMemory
    fw: FWMemory

    keeps_betas = True

    @property
    def slots(self) -> int:
        assert self.kv.window is not None, "the layer refuses it"
        return self.kv.window

    def held(self, count: Tensor) -> Tensor:
        return torch.where(count > 0, (count - 1) % self.slots + 1, 0)

    def read(
        self,
        q: Queries,
        beta: Strengths,
        timeline: Timeline,
        past: FastWeights | None,
        resets: Resets | None,
    ) -> tuple[Reads, FastWeights]:
        begins_chunk = timeline.position % self.slots == 0
        kv = self.kv(q, timeline.keys, timeline.values, begins_chunk)
        q, keys = self.fw.features(q), self.fw.features(timeline.keys)
        if past is None and resets is None and not is_symbolic(q.shape[1]):
            fw, fast_weights = self._scan_aligned(q, keys, timeline)
        elif past is not None and self._known_not(begins_chunk[:, -q.shape[1] :].any()):
            fw, fast_weights = self._read_only(q, timeline, past), past  # no chunk begins, so none is written
        else:
            fw, fast_weights = self._scan_in_order(q, keys, timeline, begins_chunk, past)
        return Reads(fw, kv), fast_weights

    @staticmethod
    def _known_not(condition: Tensor) -> bool:
        """Whether it is known not to hold. While traced nobody knows, and the general way is always right."""
        unknown = is_traced() or condition.is_meta or type(condition) is not Tensor
        return not unknown and not condition

    def _read_only(self, q: Queries, timeline: Timeline, past: FastWeights) -> Values:
        """β takes part by an empty slice: its gradient is zero, not missing, which DistributedDataParallel refuses."""
        fw = self.fw.read(q, past)
        return fw + timeline.betas[:, :0].sum() if timeline.betas.requires_grad else fw

    def _scan_aligned(self, q: Queries, keys: Keys, timeline: Timeline) -> tuple[Values, FastWeights]:
        """Where all rows begin together, the order is the same for all: chunks side by side, reads before writes.

        (Not in a program exported for any length: torch's exporter cannot show that its shapes fit.)
        """
        t, S = q.shape[1], self.slots
        n = (t + S - 1) // S

        def chunks(x: Tensor) -> Tensor:
            """[b, t, …] → [b, n, S, …]"""
            return F.pad(x, (0, 0) * (x.dim() - 2) + (0, n * S - t)).unflatten(1, (n, S))

        def reads(x: Tensor) -> Tensor:
            return torch.cat([x, torch.zeros_like(x)], dim=2).flatten(1, 2)[
                :, : (2 * n - 1) * S
            ]  # the last chunk is not written yet

        def writes(x: Tensor) -> Tensor:
            return torch.cat([torch.zeros_like(x), x], dim=2).flatten(1, 2)[:, : (2 * n - 1) * S]

        q, keys, values, betas = (chunks(x) for x in (q, keys, timeline.values, timeline.betas))
        out, fast_weights = self.fw(reads(q), writes(keys), writes(values), writes(betas), None, None)
        out = F.pad(out, (0, 0, 0, 0, 0, S)).unflatten(1, (n, 2, S))[:, :, 0]
        return out.flatten(1, 2)[:, :t], fast_weights

    def _scan_in_order(
        self, q: Queries, keys: Keys, timeline: Timeline, begins_chunk: Tensor, past: FastWeights | None
    ) -> tuple[Values, FastWeights]:
        """Each row in an order of its own: its chunks begin where its segments and its held pairs say."""
        t, l = q.shape[1], keys.shape[1]
        # [b, l]; 0: the chunk that was open before this call
        chunk = F.pad(begins_chunk[:, l - t :].cumsum(dim=1), (l - t, 0))
        open_still = (chunk == chunk[:, -1:])[..., None]
        order = torch.cat([2 * chunk[:, l - t :], 2 * chunk + 1], dim=1).argsort(dim=1, stable=True)

        def reads(x: Tensor) -> Tensor:
            """[b, t, …] → [b, t + l, …] by events, zeros where they write."""
            return _take(torch.cat([x, x.new_zeros(x.shape[0], l, *x.shape[2:])], dim=1), order)

        def writes(x: Tensor) -> Tensor:
            """[b, l, …] → [b, t + l, …] by events, zeros where they read."""
            return _take(torch.cat([x.new_zeros(x.shape[0], t, *x.shape[2:]), x], dim=1), order)

        out, fast_weights = self.fw(
            reads(q),
            writes(keys.masked_fill(open_still[..., None], 0)),
            writes(timeline.values.masked_fill(open_still[..., None], 0)),
            writes(timeline.betas.masked_fill(open_still, 0)),
            past,
            reads(timeline.position[:, l - t :] == 0),  # a segment's first read finds an empty memory
        )
        return _take(out, order.argsort(dim=1)[:, :t]), fast_weights


def _take(x: Tensor, index: Tensor) -> Tensor:
    """x[row, index[row]] for each row. x: [b, m, …], index: [b, n] → [b, n, …]."""
    index = index.view(*index.shape, *(1,) * (x.dim() - 2))
    return x.gather(1, index.expand(-1, -1, *x.shape[2:]))
