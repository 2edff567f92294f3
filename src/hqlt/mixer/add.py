from __future__ import annotations

from torch import Tensor, nn

from hqlt.memory import Heads
from hqlt.mixer.mixer import Gated
from hqlt.registry import register


@register("mixer", "add")
class AddMixer(Gated):
    """kv + γ ⊙ fw with γ = W_γ x, begun at W_γ = 0: the layer is exactly its attention at the start.

    The norm is the FW-memory's own, so that attention stays whole while the FW-memory is empty. gate_bias: where a bias
    of γ begins (None: there is none); 0 begins at attention too.
    """

    norms_fw = True

    def __init__(self, heads: Heads, *, gate_bias: float | None = None) -> None:
        super().__init__(heads, heads.reads * heads.v, gate_bias)
        self.begin()

    def begin(self) -> None:
        super().begin()
        nn.init.zeros_(self.gate_proj.weight)  # type: ignore[arg-type]

    def gates(self, logits: Tensor) -> tuple[Tensor, float]:
        return logits.unflatten(-1, (self.heads.reads, -1)), 1.0
