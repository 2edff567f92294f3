from __future__ import annotations

from torch import Tensor, nn

from hqlt.memory import Heads
from hqlt.mixer.mixer import Gated
from hqlt.registry import register


@register("mixer", "add")
class AddMixer(Gated):
    """kv + γ ⊙ fw with γ = W_γ x, begun at W_γ = 0: the layer is exactly its attention at the start.

    The norm is the FW-memory's own, so that attention stays whole while the FW-memory is empty. gate_bias: where a bias
    of γ begins (None: there is none); 0 begins at attention too. kv_gate: (1 − δ) kv in place of kv, with a number for
    each head, δ = W_δ x, begun at 0 with its bias. `gate_proj` rows: γ first, then δ. A softmax over a window alone
    gives its pairs all the weight, of which those beyond the window had a part: δ takes it back.
    """

    norms_fw = True

    def __init__(self, heads: Heads, *, gate_bias: float | None = None, kv_gate: bool = False) -> None:
        self.sizes = heads.reads * heads.v, heads.reads if kv_gate else 0
        super().__init__(heads, sum(self.sizes), gate_bias)
        self.init_parameters()

    def init_parameters(self) -> None:
        super().init_parameters()
        nn.init.zeros_(self.gate_proj.weight)  # type: ignore[arg-type]
        if self.gate_bias is not None:
            nn.init.zeros_(self.gate_proj.bias[self.sizes[0] :])  # type: ignore[index]

    def gates(self, logits: Tensor) -> tuple[Tensor, Tensor | float]:
        gamma, delta = logits.split(self.sizes, dim=-1)
        return gamma.unflatten(-1, (self.heads.reads, -1)), 1 - delta[..., None] if self.sizes[1] else 1.0
