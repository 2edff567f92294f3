"""HGRN-2: each row of the matrix writes the share that it forgets."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from hqlt.memory.fw.recurrence import Recurrence, Terms
from hqlt.memory.fw.rule import Write, check_depth, init_parameter
from hqlt.memory.heads import Heads
from hqlt.registry import register
from hqlt.shapes import Keys, Queries, at_least_float32


@register("rule", "hgrn2")
class HGRN2Memory(Recurrence):
    """HGRN-2, with the forget gate f = β + (1 − β) σ(k).

        S ← Diag(f) S      S ← S + (1 − f) ⊗ v      read: Sᵀ SiLU(q) / √k

    The key before any feature map is the logit of f, so in every blend the decay is that of the written token, whatever
    `write_gates` says.

    The lower bound β of each channel increases with depth: β = σ(lower_bound + log(l / (L − l))) in layer l ∈ 0 … L−1.
    The parameter lower_bound is initialized to 0, so that β = l/L; the first layer has none. The authors' bounds have
    the same initial values, but are cumulative sums of a softmax over the layers; here each layer has its own.

    The authors' layer has fw_activation=None and head_norm="full".

    Args:
        heads: number and width of the layer's heads.
        depth: (l, L), the layer's index and the number of layers; a model sets it for each of its layers.

    Source:
        Qin et al. 2024, "HGRN2: Gated Linear RNNs with State Expansion", section 3; the bound is from "Hierarchically
        Gated Recurrent Neural Network for Sequence Modeling", section 3.2.

    Example:
        >>> import hqlt
        >>> layer = hqlt.HybridMemory(hidden_size=64, num_heads=4, fast_weights="hgrn2", head_norm="full")
    """

    erases = False

    def __init__(self, heads: Heads, *, depth: tuple[int, int] = (0, 1)) -> None:
        super().__init__(heads)
        layer, layers = self.depth = check_depth(depth)
        self.lower_bound = nn.Parameter(torch.empty(heads.matrices, heads.k)) if layer else None
        self.offset = math.log(layer / (layers - layer)) if layer else -math.inf
        self.init_parameters()

    def init_parameters(self) -> None:
        if self.lower_bound is not None:
            init_parameter(self.lower_bound, torch.zeros_like(self.lower_bound))

    def forget(self, logits: Keys) -> tuple[Keys, Keys]:
        """Return log f and 1 − f from the logits of f, in at least float32."""
        logits = logits.to(at_least_float32(logits.dtype))
        log_f, rest = F.logsigmoid(logits), torch.sigmoid(-logits)
        if self.lower_bound is None:
            return log_f, rest
        bound = self.lower_bound.to(logits.dtype) + self.offset  # β's logit
        return torch.logaddexp(F.logsigmoid(bound), F.logsigmoid(-bound) + log_f), torch.sigmoid(-bound) * rest

    def terms(self, q: Queries, write: Write) -> Terms:
        decay, keys = self.forget(write.keys)
        return Terms(F.silu(q), keys.to(q.dtype), self.v_activation(write.values), decay=decay, erase=False)

    def extra_repr(self) -> str:
        return f"depth={self.depth}"
