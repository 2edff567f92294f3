"""The FW-memory: compressed and endless. Pairs are written into one matrix by a rule, and read by a product."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from hqlt import ops
from hqlt.ops.features import unit_silu
from hqlt.shapes import Keys, KeySum, Matrix, Queries, Resets, Strengths, Values


class FastWeights(NamedTuple):
    matrix: Matrix
    key_sum: KeySum  # [b, h, 0] where the rule has no normaliser


class FWMemory(nn.Module):
    """One matrix per row and head, and the rule that writes it. A rule has a feature map φ and a scan over time."""

    uses_beta: bool
    """Whether the rule weighs its writes by a learned β."""
    uses_key_sum: bool
    """Whether the rule keeps a normaliser beside the matrix."""

    def features(self, x: Queries) -> Queries:
        """φ, of a query or key."""
        raise NotImplementedError

    def forward(
        self,
        q: Queries,
        k: Keys,
        v: Values,
        strength: Strengths,
        past: FastWeights | None,
        resets: Resets | None,
    ) -> tuple[Values, FastWeights]:
        """At each step write (k, v) with its strength (0: not at all), then read q; q and k already mapped by φ."""
        raise NotImplementedError

    def read(self, q: Queries, past: FastWeights) -> Values:
        """Read without writing."""
        nothing = torch.zeros_like(q)
        values = q.new_zeros(*q.shape[:-1], past.matrix.shape[-1])
        return self(q, nothing, values, nothing[..., 0], past, None)[0]


class DeltaMemory(FWMemory):
    """The delta rule: correct what the memory holds under a key.

        W ← W + β (v − W φ(k)) ⊗ φ(k)        read: W φ(q) / √k        φ(x) = SiLU(x) / √(‖SiLU(x)‖² + 1e-6)

    Source: the paper, section 2.2; Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule".
    """

    uses_beta = True
    uses_key_sum = False

    def features(self, x: Queries) -> Queries:
        return unit_silu(x)

    def forward(
        self,
        q: Queries,
        k: Keys,
        v: Values,
        strength: Strengths,
        past: FastWeights | None,
        resets: Resets | None,
    ) -> tuple[Values, FastWeights]:
        state = None if past is None else past.matrix
        out, matrix = ops.delta_rule(q, k, v, strength, state=state, resets=resets)
        return out, FastWeights(matrix, matrix.new_zeros(*matrix.shape[:2], 0))


class LinearMemory(FWMemory):
    """The additive rule: linear attention, normalised over time.

        W ← W + v ⊗ φ(k)     z ← z + φ(k)     read: W φ(q) / (z·φ(q) + 1e-10)     φ(x) = elu(x) + 1

    Source: Katharopoulos et al. 2020, "Transformers are RNNs", eqs. 18–20.
    """

    uses_beta = False
    uses_key_sum = True

    def features(self, x: Queries) -> Queries:
        return F.elu(x) + 1

    def forward(
        self,
        q: Queries,
        k: Keys,
        v: Values,
        strength: Strengths,
        past: FastWeights | None,
        resets: Resets | None,
    ) -> tuple[Values, FastWeights]:
        k = k * strength[..., None].to(k.dtype)
        state = None if past is None else ops.LinearState(*past)
        out, (matrix, key_sum) = ops.linear_attention(q, k, v, state=state, resets=resets)
        return out, FastWeights(matrix, key_sum)


RULES: dict[str, type[FWMemory]] = {"delta": DeltaMemory, "linear": LinearMemory}
