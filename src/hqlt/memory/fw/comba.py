"""Comba: the gated delta rule with closed-loop control: the key corrects the query as well as the value."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hqlt import ops
from hqlt.memory.fw.gated_delta import GatedDeltaGates, GatedErasing
from hqlt.memory.fw.recurrence import Terms
from hqlt.memory.fw.rule import Write, init_parameter
from hqlt.memory.heads import Heads
from hqlt.ops.heads import repeated
from hqlt.ops.segments import written
from hqlt.registry import register
from hqlt.shapes import Keys, Queries

LEAST = -20.0
"""Minimum of log α: e^−20 leaves nothing of S in float32, and 1/α is still finite."""


@register("rule", "comba")
class CombaMemory(GatedErasing):
    """Comba, a gated delta rule that erases the undecayed S and corrects the query along the written key.

        S ← α S + φ(k) ⊗ β (v − Sᵀ p)        with S before the decay on the right, and p = σ(d) φ(k)
        read: Sᵀ unit(SiLU(q) − D σ(d) SiLU(k)) / √k        unit(x) = x / √(‖x‖² + 1e-6)        φ(x) = unit(SiLU(x))

    β = σ(W_β x). α is that of the gated delta rule, at least e^−20, with exp(A_log) initially uniform in (0, 16). d and
    D are one number per key head; d is initialized to 1.

    The key that corrects q is the one written at the same step: with Delayed-Streaming that of the token that leaves
    the window. Delayed-Chunk reads at steps that write nothing, where q is not corrected.

    flash-linear-attention normalizes p again, so that σ(d) cancels in the erased term. A checkpoint of that layer
    corresponds to inner_decay=False here, with D · σ(d) as D.

    Args:
        heads: number and width of the layer's heads.
        correction: initial D. The authors use 1, and 0.02 for small models. None: q is not corrected.
        inner_decay: whether there is a d; otherwise σ(d) is 1.

    Source:
        Hu et al. 2025, "Improving Bilinear RNNs with Closed-loop Control", section 3; initial values as in the authors'
        code in flash-linear-attention.

    Example:
        >>> import hqlt
        >>> layer = hqlt.HybridMemory(hidden_size=64, num_heads=4, fast_weights="comba", correction=0.02)
    """

    slowest = 0.0

    def __init__(self, heads: Heads, *, correction: float | None = 1.0, inner_decay: bool = True) -> None:
        super().__init__(heads, beta_max=1.0)
        self.correction = correction
        self.d = nn.Parameter(torch.empty(heads.keys)) if inner_decay else None
        self.D = None if correction is None else nn.Parameter(torch.empty(heads.keys))
        self.init_parameters()

    def init_parameters(self) -> None:
        super().init_parameters()
        if self.d is not None:
            init_parameter(self.d, torch.ones_like(self.d))
        if self.D is not None and self.correction is not None:
            init_parameter(self.D, torch.full_like(self.D, self.correction))

    def gates(self, logits: tuple[Tensor, Tensor]) -> GatedDeltaGates:
        beta, decay = super().gates(logits)
        return GatedDeltaGates(beta, decay.clamp(min=LEAST))

    def terms(self, q: Queries, write: Write) -> Terms:
        beta, decay = write.gates
        k, v = ops.unit_silu(write.keys), self.v_activation(write.values)
        p = k if self.d is None else self._each(self.d.sigmoid()) * k
        return Terms(self._corrected(q, write), k, v, beta, decay, erase=p * (-decay).exp()[..., None])

    def _corrected(self, q: Queries, write: Write) -> Queries:
        if self.D is None:
            return ops.unit_silu(q)
        weight = self.D if self.d is None else self.D * self.d.sigmoid()
        (keys,) = written(write.live, write.keys)
        x = F.silu(q) - repeated(q, self._each(weight) * F.silu(keys))[0]
        return x * (x.square().sum(dim=-1, keepdim=True) + 1e-6).rsqrt()

    def _each(self, numbers: Tensor) -> Keys:
        """Repeat one number per key head to one per matrix: [h, 1]."""
        return numbers.repeat_interleave(self.heads.matrices // self.heads.keys)[:, None]

    def extra_repr(self) -> str:
        return f"correction={self.correction}, inner_decay={self.d is not None}"
