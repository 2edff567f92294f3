"""One memory alone, from the same parts: the baselines."""

from __future__ import annotations

from hqlt.blend.blend import Blend
from hqlt.blend.synchronous import Synchronous
from hqlt.registry import register


@register("blend", "kv-only")
class KVOnly(Blend):
    """Softmax attention alone, over a window or (window None) over everything: a transformer's layer."""

    has_fw = False
    native = "nothing"


@register("blend", "fw-only")
class FWOnly(Synchronous):
    """Fast weights alone: DeltaNet, or with the additive rule a linear transformer."""

    has_kv = False
    native = "own"

    @property
    def slots(self) -> int:
        return 0
