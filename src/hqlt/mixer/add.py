from __future__ import annotations

from torch import Tensor, nn

from hqlt.memory import Heads
from hqlt.mixer.mixer import Gated
from hqlt.registry import register


@register("mixer", "add")
class AddMixer(Gated):
    """kv + γ ⊙ RMSNorm(fw) with γ = W_γ x. W_γ is initialized to 0, so that the layer starts as plain attention.

    The head norm applies to the FW read only, which leaves attention unchanged while the FW-memory is empty. The rows
    of `gate_proj` are those of γ, then those of δ.

    Args:
        heads: number and width of the layer's heads.
        gate_bias: initial bias of γ (0 starts as plain attention too). Default: no bias.
        kv_gate: whether kv becomes (1 − δ) kv, with one δ = W_δ x per head, initialized to 0. A softmax over a window
            gives its entries the weight that full attention gives to entries beyond the window; δ can take it back.

    Example:
        >>> import hqlt
        >>> layer = hqlt.HybridMemory(hidden_size=64, num_heads=4, mixer="add", kv_gate=True)
    """

    norms_fw = True

    @property
    def native(self) -> str:  # type: ignore[override]
        """Name of this mixer in `hqlt.ops.step`."""
        return "add-and-gate" if self.sizes[1] else "add"

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
