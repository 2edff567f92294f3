"""HGRN-2: what a row of the matrix does not keep is what it writes."""

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
    """S ← Diag(f) S      S ← S + (1 − f) ⊗ v      read: Sᵀ SiLU(q) / √k      f = β + (1 − β) σ(k)

    The raw key is f's logit, so the decay is the written token's in every blend, whatever `write_gates` says.

    β, the least f of each channel, is greater in deeper layers: β = σ(lower_bound + log(l / (L − l))) in layer
    l ∈ 0 … L−1, with the parameter lower_bound begun at 0, so that β = l/L, and none in the first layer. Those are the
    authors' values at the start; theirs are Σ_{1…l} of a softmax over the layers, ours each layer's own. depth: (l, L);
    a model says it to each of its layers.

    The authors' layer has no activation of values (fw_activation=None) and head_norm="full".

    Source: Qin et al. 2024, "HGRN2: Gated Linear RNNs with State Expansion", section 3; the bound is that of
    "Hierarchically Gated Recurrent Neural Network for Sequence Modeling", section 3.2.
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
        """From f's logits to log f and 1 − f, in at least float32."""
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
