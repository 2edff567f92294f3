"""One memory alone, from the same parts: the baselines."""

from __future__ import annotations

from hqlt.blend.blend import Blend, Memories, Reads, Timeline, Tokens
from hqlt.memory import Tree, Write
from hqlt.registry import register
from hqlt.shapes import Resets


@register("blend", "kv-only")
class KVOnly(Blend):
    """Softmax attention alone, over a window or (window None) over everything: a transformer's layer."""

    has_fw = False
    native = "nothing"

    def read(
        self, memories: Memories, new: Tokens, timeline: Timeline, past: Tree | None, resets: Resets | None
    ) -> tuple[Reads, Tree]:
        assert memories.kv is not None
        return Reads(None, self.attend(memories.kv, new.q, timeline)), ()


@register("blend", "fw-only")
class FWOnly(Blend):
    """Fast weights alone: DeltaNet, or with the additive rule a linear transformer."""

    has_kv = False
    native = "own"

    @property
    def slots(self) -> int:
        return 0

    def read(
        self, memories: Memories, new: Tokens, timeline: Timeline, past: Tree | None, resets: Resets | None
    ) -> tuple[Reads, Tree]:
        assert memories.fw is not None
        fw, after = memories.fw(new.q, Write(new.keys, new.values, new.gates, None), past, resets)
        return Reads(fw, None), after
