"""Delayed-Chunk: a whole chunk of tokens is written to the FW-memory when the next chunk begins."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from hqlt.blend.blend import Blend, Timeline, Tokens
from hqlt.memory import FWMemory, Tree, Write
from hqlt.registry import register
from hqlt.shapes import Queries, Resets, Values, is_symbolic


@register("blend", "delayed-chunk")
class DelayedChunk(Blend):
    """At step t the KV-memory holds t's chunk of S tokens up to t, and the FW-memory holds all earlier chunks.

    Chunks are counted from the start of a segment, however it is split into calls. Each token is written with its own
    gates when the first token of the next chunk arrives. The scan therefore processes a sequence of events per row, the
    reads of a chunk first, then its writes (here S = 2):

        tokens      0   1   2   3   4
        events    r0 r1 w0 w1 r2 r3 w2 w3 r4        token 4 is not written yet

    A read is an event that is not live; the output of a write event is dropped. So any write rule works unchanged.

    Args:
        window (tokens): chunk size S.

    Source:
        The paper, section 3, "Delayed-Chunk blending"; Munkhdalai et al. 2024, "Infini-attention".

    Example:
        >>> import hqlt
        >>> layer = hqlt.HybridMemory(hidden_size=64, num_heads=4, window=16, blend="delayed-chunk")
    """

    native = "chunk"
    needs_window = True
    keeps_gates = True

    @property
    def slots(self) -> int:
        assert self.window is not None
        return self.window

    def held_count(self, count: Tensor) -> Tensor:
        return torch.where(count > 0, (count - 1) % self.slots + 1, 0)

    def leave_position(self, position: Tensor) -> Tensor:
        return (position // self.slots + 1) * self.slots

    def kv_resets(self, timeline: Timeline) -> Resets:
        return timeline.position % self.slots == 0

    def scan(
        self, fw: FWMemory, new: Tokens, timeline: Timeline, past: Tree | None, resets: Resets | None
    ) -> tuple[Values, Tree]:
        q, begins_chunk = new.q, self.kv_resets(timeline)
        if past is None and resets is None and not is_symbolic(q.shape[1]):
            return self._scan_aligned(fw, q, timeline)
        if past is not None and self.is_known_false(begins_chunk[:, -q.shape[1] :].any()):
            return self._read_only(fw, q, timeline, past), past  # no chunk begins, so nothing is written
        return self._scan_in_order(fw, q, timeline, begins_chunk, past)

    def _read_only(self, fw: FWMemory, q: Queries, timeline: Timeline, past: Tree) -> Values:
        """Read without writing.

        Gates contribute an empty slice: distributed training needs their gradients to be zero, not missing.
        """
        gates = [gate[:, :0].sum() for gate in pytree.tree_leaves(timeline.gates) if gate.requires_grad]
        return sum(gates, start=fw.read(q, past))

    def _scan_aligned(self, fw: FWMemory, q: Queries, timeline: Timeline) -> tuple[Values, Tree]:
        """Scan rows that all start a segment, so that the order of events is the same for all of them.

        Not used in a program exported with a dynamic length: the exporter cannot prove that the shapes match.
        """
        t, S = q.shape[1], self.slots
        n = (t + S - 1) // S
        events = (2 * n - 1) * S  # the last chunk is not written yet

        def chunks(x: Tensor) -> Tensor:
            """[b, t, …] → [b, n, S, …]"""
            return F.pad(x, (0, 0) * (x.dim() - 2) + (0, n * S - t)).unflatten(1, (n, S))

        def reads(x: Tensor) -> Tensor:
            x = chunks(x)
            return torch.cat([x, torch.zeros_like(x)], dim=2).flatten(1, 2)[:, :events]

        def writes(x: Tensor) -> Tensor:
            x = chunks(x)
            return torch.cat([torch.zeros_like(x), x], dim=2).flatten(1, 2)[:, :events]

        live = (torch.arange(events, device=q.device) // S % 2 == 1).expand(q.shape[0], -1)
        keys, values, gates = pytree.tree_map(writes, (timeline.keys, timeline.values, timeline.gates))
        out, after = fw(reads(q), Write(keys, values, gates, live), None, None)
        out = F.pad(out, (0, 0, 0, 0, 0, S)).unflatten(1, (n, 2, S))[:, :, 0]
        return out.flatten(1, 2)[:, :t], after

    def _scan_in_order(
        self, fw: FWMemory, q: Queries, timeline: Timeline, begins_chunk: Tensor, past: Tree | None
    ) -> tuple[Values, Tree]:
        """Scan rows whose events have different orders, given by their segments and held entries."""
        t, l = q.shape[1], timeline.keys.shape[1]
        # [b, l]; 0 is the chunk that was open before this call
        chunk = F.pad(begins_chunk[:, l - t :].cumsum(dim=1), (l - t, 0))
        closed = (chunk != chunk[:, -1:]) & (timeline.position >= 0)
        if l > t:  # slots that the open chunk has not filled yet are unused
            own = timeline.position[:, : l - t] // self.slots
            closed = closed & F.pad(own == own[:, -1:], (0, t), value=True)
        order = torch.cat([2 * chunk[:, l - t :], 2 * chunk + 1], dim=1).argsort(dim=1, stable=True)

        def reads(x: Tensor) -> Tensor:
            """[b, t, …] → [b, t + l, …] in the order of events, with zeros at writes"""
            return _take(torch.cat([x, x.new_zeros(x.shape[0], l, *x.shape[2:])], dim=1), order)

        def writes(x: Tensor) -> Tensor:
            """[b, l, …] → [b, t + l, …] in the order of events, with zeros at reads"""
            return _take(torch.cat([x.new_zeros(x.shape[0], t, *x.shape[2:]), x], dim=1), order)

        entries = self.zero_not_live((timeline.keys, timeline.values, timeline.gates), closed)
        keys, values, gates, live = pytree.tree_map(writes, (*entries, closed))
        begins = reads(timeline.position[:, l - t :] == 0)  # the first read of a segment finds an empty memory
        out, after = fw(reads(q), Write(keys, values, gates, live), past, begins)
        return _take(out, order.argsort(dim=1)[:, :t]), after


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Return x[row, index[row]] for each row: x [b, m, …], index [b, n] → [b, n, …]."""
    index = index.view(*index.shape, *(1,) * (x.dim() - 2))
    return x.gather(1, index.expand(-1, -1, *x.shape[2:]))
