"""Delayed-Chunk: tokens gather in the KV-memory; a whole chunk goes to the FW-memory when the next one begins."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hqlt.blend.blend import Blend, Reads, Timeline
from hqlt.memory import FastWeights, FWMemory, KVMemory
from hqlt.shapes import Queries, Resets, Strengths


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
        kv = self.kv.read(q, timeline.keys, timeline.values, begins_chunk)
        fw, fast_weights = self._read_between_chunks(q, timeline, begins_chunk, past)
        return Reads(fw, kv), fast_weights

    def _read_between_chunks(
        self, q: Queries, timeline: Timeline, begins_chunk: Tensor, past: FastWeights | None
    ) -> tuple[Tensor, FastWeights]:
        t, l = q.shape[1], timeline.keys.shape[1]
        q = self.fw.features(q)
        begins = begins_chunk[:, l - t :]
        # Between two chunks nothing is written. (While tracing nobody knows, and the general way is always right.)
        if past is not None and not torch.compiler.is_compiling() and not begins.any():
            return self.fw.read(q, past), past

        chunk = F.pad(begins.cumsum(dim=1), (l - t, 0))  # [b, l]; 0: the chunk that was open before this call
        complete = chunk < chunk[:, -1:]
        order = torch.cat([2 * chunk[:, l - t :], 2 * chunk + 1], dim=1).argsort(dim=1, stable=True)

        def of_reads(x: Tensor) -> Tensor:
            """[b, t, …] → [b, t + l, …] by events, zeros where they write."""
            return _take(torch.cat([x, x.new_zeros(len(x), l, *x.shape[2:])], dim=1), order)

        def of_writes(x: Tensor) -> Tensor:
            """[b, l, …] → [b, t + l, …] by events, zeros where they read."""
            return _take(torch.cat([x.new_zeros(len(x), t, *x.shape[2:]), x], dim=1), order)

        out, fast_weights = self.fw.scan(
            of_reads(q),
            of_writes(self.fw.features(timeline.keys)),
            of_writes(timeline.values),
            of_writes(timeline.betas * complete[..., None]),
            past,
            of_reads(timeline.position[:, l - t :] == 0),  # a segment's first read finds an empty memory
        )
        return _take(out, order.argsort(dim=1)[:, :t]), fast_weights


def _take(x: Tensor, index: Tensor) -> Tensor:
    """x[row, index[row]] for each row. x: [b, m, …], index: [b, n] → [b, n, …]."""
    return torch.take_along_dim(x, index.view(*index.shape, *(1,) * (x.dim() - 2)), dim=1)
