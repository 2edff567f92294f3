"""Delayed-Streaming: a token is written to the FW-memory when it leaves the KV-memory's window."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from hqlt.blend.blend import Blend, Memories, Timeline, Tokens
from hqlt.memory import FWMemory, Tree, Write
from hqlt.registry import check_choice, name_of, register
from hqlt.shapes import Resets, Values

WRITE_GATES = ("current", "own")


@register("blend", "delayed-streaming")
class DelayedStreaming(Blend):
    """At step t the KV-memory holds tokens t−S+1 … t and the FW-memory holds tokens 1 … t−S.

    Every past token is in exactly one memory. Token t−S leaves the window at step t and is written before the FW-memory
    is read.

    Args:
        window (tokens): window S.
        write_gates: gates with which token t−S is written: those of the "current" token t (default, as in the paper)
            or its "own".

    Raises:
        ValueError: when write_gates is neither.

    Source:
        The paper, section 3, "Delayed-Streaming blending".

    Example:
        >>> import hqlt
        >>> layer = hqlt.HybridMemory(hidden_size=64, num_heads=4, blend="delayed-streaming", write_gates="own")
    """

    needs_window = True

    def __init__(self, window: int | None, *, write_gates: str = "current") -> None:
        super().__init__(window)
        check_choice("write_gates", write_gates, WRITE_GATES)
        self.keeps_gates = write_gates == "own"

    @property
    def native(self) -> str | None:  # type: ignore[override]
        """Name of this blend's writes in `hqlt.ops.step`, which supports the current token's gates."""
        return None if self.keeps_gates else "leaving"

    @property
    def slots(self) -> int:
        assert self.window is not None
        return self.window

    def check(self, memories: Memories) -> None:
        super().check(memories)
        _, fw = memories.both()
        if fw.gates_hold_pairs and not self.keeps_gates:
            raise ValueError(
                f"write_gates: expected 'own' with fast_weights={name_of('rule', type(fw))!r}, whose gates hold keys "
                f"and values of the written token, got 'current'"
            )

    def scan(
        self, fw: FWMemory, new: Tokens, timeline: Timeline, past: Tree | None, resets: Resets | None
    ) -> tuple[Values, Tree]:
        t, l = new.q.shape[1], timeline.keys.shape[1]
        live = (
            timeline.position[:, -t:] >= self.slots
        )  # otherwise token t−S belongs to another segment or does not exist

        def leaving(x: Tensor) -> Tensor:
            """Shift from token t to token t−S: the token that leaves the window at t"""
            return F.pad(x, (*(0, 0) * (x.dim() - 2), self.slots - (l - t), 0))[:, :t]

        keys, values, gates = pytree.tree_map(leaving, (timeline.keys, timeline.values, timeline.gates))
        keys, values, gates = self.zero_not_live((keys, values, gates if self.keeps_gates else new.gates), live)
        read, after = fw(new.q, Write(keys, values, gates, live), past, resets)
        return read, after

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, write_gates={WRITE_GATES[self.keeps_gates]!r}"
