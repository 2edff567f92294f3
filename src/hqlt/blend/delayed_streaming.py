"""Delayed-Streaming: a token goes to the FW-memory in the moment in which it leaves the KV-memory."""

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
    """At step t the KV-memory holds tokens t−S+1 … t and the FW-memory 1 … t−S: each past token is in exactly one.

    The pair of token t−S falls out of the window at step t, is written, and then the FW-memory is read. It is written
    with the gates of the current token t, or (write_gates="own") with those that token t−S had itself.

    Source: the paper, section 3, "Delayed-Streaming blending"; there with the current gates.
    """

    needs_window = True

    def __init__(self, window: int | None, *, write_gates: str = "current") -> None:
        super().__init__(window)
        check_choice("write_gates", write_gates, WRITE_GATES)
        self.keeps_gates = write_gates == "own"

    @property
    def native(self) -> str | None:  # type: ignore[override]
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
                f"and values of their own token, which the current token does not have for the one that it writes; "
                f"got 'current'"
            )

    def scan(
        self, fw: FWMemory, new: Tokens, timeline: Timeline, past: Tree | None, resets: Resets | None
    ) -> tuple[Values, Tree]:
        t, l = new.q.shape[1], timeline.keys.shape[1]
        live = timeline.position[:, -t:] >= self.slots  # else token t−S is of another segment, or none

        def leaving(x: Tensor) -> Tensor:
            """What token t−S had, for each new token t."""
            return F.pad(x, (*(0, 0) * (x.dim() - 2), self.slots - (l - t), 0))[:, :t]

        keys, values, gates = pytree.tree_map(leaving, (timeline.keys, timeline.values, timeline.gates))
        keys, values, gates = self.zero_not_live((keys, values, gates if self.keeps_gates else new.gates), live)
        read, after = fw(new.q, Write(keys, values, gates, live), past, resets)
        return read, after

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, write_gates={WRITE_GATES[self.keeps_gates]!r}"
