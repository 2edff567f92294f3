from __future__ import annotations

from torch import Tensor

from hqlt.memory import Heads
from hqlt.mixer.mixer import Gated
from hqlt.registry import register


@register("mixer", "scalar")
class ScalarMixer(Gated):
    """g_FW fw + g_KV kv, with two independent scalars per head, (g_FW, g_KV) = σ(W x).

    The rows of `gate_proj` are those of g_FW, then those of g_KV.

    Args:
        heads: number and width of the layer's heads.
        gate_bias: initial bias of the projection. Default: no bias.

    Source:
        The paper, section 3, the dynamic scalar mixer.

    Example:
        >>> import hqlt
        >>> layer = hqlt.HybridMemory(hidden_size=64, num_heads=4, mixer="scalar")
    """

    native = "scalar"

    def __init__(self, heads: Heads, *, gate_bias: float | None = None) -> None:
        super().__init__(heads, 2 * heads.reads, gate_bias)

    def gates(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        fw, kv = logits.sigmoid()[..., None].chunk(2, dim=-2)
        return fw, kv
