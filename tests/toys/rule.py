"""A write rule with decay and a second matrix."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

import hqlt
from hqlt.memory import Entry, FWMemory, Heads, Write
from hqlt.shapes import at_least_float32


class Gates(NamedTuple):
    decay: Tensor  # [b, t, h]
    strength: Tensor  # [b, t, h]


class TwoMatrices(NamedTuple):
    fading: Tensor  # [b, h, k, v]
    lasting: Tensor


@hqlt.register("rule", "two-speeds")
class TwoSpeeds(FWMemory):
    """F ← α F + β k ⊗ v     L ← L + β k ⊗ v     read: (F + L / 8)ᵀ q     α = slowest + (1 − slowest) σ(·)"""

    def __init__(self, heads: Heads, *, slowest: float = 0.5) -> None:
        super().__init__(heads)
        self.slowest = slowest
        self.gate_proj = nn.Linear(heads.hidden_size, 2 * heads.matrices, bias=False)

    def logits(self, x: Tensor) -> Tensor:
        return self.gate_proj(x)

    def gates(self, logits: Tensor) -> Gates:
        decay, strength = logits.to(at_least_float32(logits.dtype)).sigmoid().chunk(2, dim=-1)
        return Gates(self.slowest + (1 - self.slowest) * decay, strength)

    def gate_entries(self) -> Gates:
        return Gates(Entry((self.heads.matrices,)), Entry((self.heads.matrices,)))

    def state_entries(self) -> TwoMatrices:
        matrix = Entry((self.heads.matrices, self.heads.k, self.heads.v))
        return TwoMatrices(matrix, matrix)

    def forward(self, q, write: Write, past, resets):
        wide = write.gates.decay.dtype
        if past is None:
            past = self.state_entries()
            past = TwoMatrices(*(entry.zeros(len(q), write.gates.decay, q.device) for entry in past))
        fading, lasting = past
        values = self.v_activation(write.values)
        reads = []
        for t in range(q.shape[1]):
            if resets is not None:
                fading, lasting = (x.masked_fill(resets[:, t, None, None, None], 0) for x in (fading, lasting))
            decay, strength = (gate[:, t, :, None, None] for gate in write.gates)
            pair = strength * write.keys[:, t, :, :, None] * values[:, t, :, None, :]
            after = decay * fading + pair, lasting + pair
            if write.live is not None:
                live = write.live[:, t, None, None, None]
                after = tuple(torch.where(live, new, old) for new, old in zip(after, (fading, lasting), strict=True))
            fading, lasting = after
            query = q[:, t].to(wide).unflatten(1, (self.heads.matrices, -1))  # a group of queries shares a matrix
            reads.append(torch.einsum("bhkv,bhgk->bhgv", fading + lasting / 8, query).flatten(1, 2))
        return torch.stack(reads, dim=1).to(q.dtype), TwoMatrices(fading, lasting)
