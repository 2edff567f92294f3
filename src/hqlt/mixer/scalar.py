from __future__ import annotations

from torch import Tensor

from hqlt.memory import Heads
from hqlt.mixer.mixer import Gated
from hqlt.registry import register


@register("mixer", "scalar")
class ScalarMixer(Gated):
    """σ(·) fw + σ(·) kv: two independent scalars a head. `gate_proj` rows: the FW heads first, then the KV heads.

    Source: the paper, section 3, the dynamic scalar mixer.
    """

    native = "scalar"

    def __init__(self, heads: Heads, *, gate_bias: float | None = None) -> None:
        super().__init__(heads, 2 * heads.reads, gate_bias)

    def gates(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        fw, kv = logits.sigmoid()[..., None].chunk(2, dim=-2)
        return fw, kv
