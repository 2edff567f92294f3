from __future__ import annotations

from hqlt.mixer.mixer import Mixer
from hqlt.registry import register


@register("mixer", "sum")
class SumMixer(Mixer):
    """fw + kv, without gates.

    Example:
        >>> import hqlt
        >>> layer = hqlt.HybridMemory(hidden_size=64, num_heads=4, mixer="sum")
    """

    native = "sum"

    def gates(self, logits: None) -> tuple[float, float]:
        return 1.0, 1.0
