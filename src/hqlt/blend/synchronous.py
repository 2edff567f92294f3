"""Synchronous: a token goes to both memories at once."""

from __future__ import annotations

from hqlt.blend.blend import Blend, Memories, Reads, Timeline, Tokens
from hqlt.memory import Tree, Write
from hqlt.registry import register
from hqlt.shapes import Resets


@register("blend", "synchronous")
class Synchronous(Blend):
    """At step t the KV-memory holds tokens t−S+1 … t and the FW-memory 1 … t, written before it is read.

    Source: the paper, section 3, "Synchronous blending".
    """

    native = "own"

    def read(
        self, memories: Memories, new: Tokens, timeline: Timeline, past: Tree | None, resets: Resets | None
    ) -> tuple[Reads, Tree]:
        kv, fw = memories.both()
        written, after = fw(new.q, Write(new.keys, new.values, new.gates, None), past, resets)
        return Reads(written, self.attend(kv, new.q, timeline)), after
