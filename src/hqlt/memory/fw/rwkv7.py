"""The core of RWKV-7: a decay per row, and different keys for erasing and writing."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hqlt.memory.fw.recurrence import Recurrence, Terms
from hqlt.memory.fw.rule import Errors, LowRank, Write, check_depth, init_parameter
from hqlt.memory.heads import Heads
from hqlt.memory.state import Entry
from hqlt.registry import register
from hqlt.shapes import Hidden, Keys, Queries, Strengths, Values, at_least_float32

LEAST = -math.exp(-0.5)
"""Minimum of log α."""


class RWKV7Gates(NamedTuple):
    """The gates of RWKV-7."""

    decay: Keys
    """[b, t, h, k] log α, in at least float32"""
    rate: Keys
    """[b, t, h, k] in-context learning rates a, in at least float32"""


@register("rule", "rwkv7")
class RWKV7Memory(Recurrence):
    """The state evolution of RWKV-7's time mixing.

        S ← Diag(α) S − (a ⊙ κ̂) ⊗ (Sᵀ κ̂) + k̃ ⊗ v        with S before the decay on the right        read: Sᵀ q
        κ̂ = (k ⊙ k_k) / ‖k ⊙ k_k‖        k̃ = k ⊙ (1 + (a − 1) ⊙ k_a)        a = σ(A↑ A↓ x + b_a)
        log α = −e^−½ σ(W↑ tanh(W↓ x) + b_α)

    These are two steps of the family's recurrence per token: one writes the value 0 along a ⊙ κ̂ and erases along κ̂ ⊘ α,
    the other writes v along k̃ and erases nothing. α is at least 0.545.

    Not included are token shift (conv_size is the closest option), the mixing of the first layer's values into later
    layers, the bonus for a token's own key and value, and group norm (the layer has RMSNorm). The authors' layer has
    fw_activation=None, and their gate is output_gate.

    Args:
        heads: number and width of the layer's heads.
        decay_rank: number of rows of W↓ and A↓. Default: 2.5 √hidden_size · k / 64, rounded to a multiple of 32, at
            least 32, as the authors'.
        depth: (l, L), the layer's index and the number of layers, on which the initial decays depend; a model sets it
            for each of its layers.

    Source:
        Peng et al. 2025, "RWKV-7 'Goose' with Expressive Dynamic State Evolution", section 4; initial values as in the
        authors' code in flash-linear-attention.

    Example:
        >>> import hqlt
        >>> layer = hqlt.HybridMemory(hidden_size=64, num_heads=4, fast_weights="rwkv7", conv_size=2)
    """

    writes = 2

    def __init__(self, heads: Heads, *, decay_rank: int | None = None, depth: tuple[int, int] = (0, 1)) -> None:
        super().__init__(heads)
        self.depth = check_depth(depth)
        nearest = round(2.5 * math.sqrt(heads.hidden_size) * heads.k / 64 / 32)
        rank = 32 * max(nearest, 1) if decay_rank is None else decay_rank
        width = heads.matrices * heads.k
        self.decay_proj = LowRank(heads.hidden_size, rank, width, bias=True, activation=nn.Tanh())
        self.a_proj = LowRank(heads.hidden_size, rank, width, bias=True)
        self.k_k, self.k_a = (nn.Parameter(torch.empty(width)) for _ in range(2))
        self.init_parameters()

    def init_parameters(self) -> None:
        h, k = self.heads.matrices, self.heads.k
        layer, layers = self.depth
        later = (layer / max(layers - 1, 1)) ** 0.3
        along = torch.linspace(0, 1, h * k)
        within = torch.linspace(-1, 1, k).repeat(h)
        bends = within * within.abs()
        init_parameter(self.decay_proj.up.bias, 6 * along ** (1 + later) - 5.5 + 2.5 * bends)
        init_parameter(self.a_proj.up.bias, 0.4 * (along - 0.5) - 0.19 + 0.3 * bends)
        init_parameter(self.k_k, 0.71 - 0.1 * (along - 0.5))
        init_parameter(self.k_a, torch.full((h * k,), 1.02))
        for proj in (self.decay_proj, self.a_proj):
            init_parameter(proj.down.weight, torch.zeros(()))
            rows, columns = proj.up.weight.shape
            gain = 0.1 * max(math.sqrt(columns / rows), 1)
            init_parameter(proj.up.weight, nn.init.orthogonal_(torch.empty(rows, columns), gain))

    def logits(self, x: Hidden) -> tuple[Tensor, Tensor]:
        return self.decay_proj(x), self.a_proj(x)

    def gates(self, logits: tuple[Tensor, Tensor]) -> RWKV7Gates:
        decay, rate = (
            x.to(at_least_float32(x.dtype)).sigmoid().unflatten(-1, (self.heads.matrices, self.heads.k)) for x in logits
        )
        return RWKV7Gates(LEAST * decay, rate)

    def gate_entries(self) -> RWKV7Gates:
        return RWKV7Gates(*[Entry((self.heads.matrices, self.heads.k))] * 2)  # type: ignore[arg-type]

    def terms(self, q: Queries, write: Write) -> Terms:
        decay, rate = write.gates
        k_k, k_a = (x.to(rate.dtype).view(self.heads.matrices, self.heads.k) for x in (self.k_k, self.k_a))
        keys, v = write.keys.to(rate.dtype), self.v_activation(write.values)
        kappa = F.normalize(keys * k_k, dim=-1)
        erased = torch.stack([kappa * (-decay).exp(), torch.zeros_like(kappa)], dim=2)
        along = torch.stack([rate * kappa, keys * (1 + (rate - 1) * k_a)], dim=2)
        values = torch.stack([torch.zeros_like(v), v], dim=2)
        k, v, erase = (x.flatten(1, 2) for x in (along, values, erased))
        return Terms(q, k.to(q.dtype), v, decay=decay, erase=erase, scale=1.0)

    def errors(self, e: Values, beta: Strengths | None, t: int) -> Errors:
        """Return the error of both steps together, v − Sᵀ κ̂."""
        error = e.unflatten(1, (t, 2)).sum(dim=2).norm(dim=-1)
        return Errors(error, error)
