from __future__ import annotations

from torch import Tensor

from hqlt.blend import Reads
from hqlt.memory import Heads
from hqlt.mixer.mixer import Gated
from hqlt.registry import register
from hqlt.shapes import Values


@register("mixer", "vector")
class VectorMixer(Gated):
    """γ ⊙ fw + (1 − γ) ⊙ kv, with one γ = σ(W_γ x) per channel.

    Args:
        heads: number and width of the layer's heads.
        gate_bias: initial bias of the projection. Default: no bias.

    Source:
        The paper, section 3, the dynamic vector mixer.

    Example:
        >>> import hqlt
        >>> layer = hqlt.HybridMemory(hidden_size=64, num_heads=4, mixer="vector", gate_bias=0.0)
    """

    native = "vector"

    def __init__(self, heads: Heads, *, gate_bias: float | None = None) -> None:
        super().__init__(heads, heads.reads * heads.v, gate_bias)

    def gates(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        gamma = logits.sigmoid().unflatten(-1, (self.heads.reads, -1))
        return gamma, 1 - gamma

    def forward(self, logits: Tensor, reads: Reads) -> Values:
        (fw, kv), (gamma, _) = reads.both(), self.gates(logits)
        return kv + gamma * (fw - kv)
