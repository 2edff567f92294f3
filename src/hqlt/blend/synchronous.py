"""Synchronous: a token reaches both memories at once."""

from __future__ import annotations

from typing import Any

from hqlt.blend.blend import Blend, Timeline, Tokens
from hqlt.memory import FWMemory, Tree, Write
from hqlt.registry import register
from hqlt.shapes import Resets


@register("blend", "synchronous")
class Synchronous(Blend):
    """At step t the KV-memory holds tokens t−S+1 … t and the FW-memory holds tokens 1 … t.

    Token t is written before the FW-memory is read.

    Args:
        window (tokens): window S. None: full attention.

    Source:
        The paper, section 3, "Synchronous blending".

    Example:
        >>> import hqlt
        >>> layer = hqlt.HybridMemory(hidden_size=64, num_heads=4, window=8, blend="synchronous")
    """

    native = "own"
    writes_on_arrival = True

    def scan(
        self, fw: FWMemory, new: Tokens, timeline: Timeline, past: Tree | None, resets: Resets | None, **errors: bool
    ) -> tuple[Any, ...]:
        out: tuple[Any, ...] = fw(new.q, Write(new.keys, new.values, new.gates, None), past, resets, **errors)
        return out
