"""The baselines with one memory, made of the same parts."""

from __future__ import annotations

from hqlt.blend.blend import Blend
from hqlt.blend.synchronous import Synchronous
from hqlt.registry import register


@register("blend", "kv-only")
class KVOnly(Blend):
    """Softmax attention alone, over a window or over everything (window None), as in a transformer.

    Args:
        window (tokens): number of latest tokens to attend to, the current one included. None: all.

    Example:
        >>> import hqlt
        >>> layer = hqlt.HybridMemory(hidden_size=64, num_heads=4, window=None, blend="kv-only")
    """

    has_fw = False
    native = "nothing"


@register("blend", "fw-only")
class FWOnly(Synchronous):
    """Fast weights alone: DeltaNet, or a linear transformer with an additive rule.

    Example:
        >>> import hqlt
        >>> layer = hqlt.HybridMemory(hidden_size=64, num_heads=4, blend="fw-only", fast_weights="gated-delta")
    """

    has_kv = False
    native = "own"

    @property
    def slots(self) -> int:
        return 0
