"""From a layer's projections to its heads: what stands between, run part by part or by something fused."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from torch import Tensor, nn

from hqlt.blend.blend import Blend, Reads
from hqlt.blend.mixer import Mixer
from hqlt.memory import MemoryState
from hqlt.shapes import Keys, Queries, Resets, Strengths, Values, at_least_float32


class Projected(NamedTuple):
    """What the projections make of x."""

    q: Queries
    k: Keys
    v: Values
    """[b, t, h, v], before its activation."""
    beta: Strengths | None
    """[b, t, h], logits of the write strengths; None for a rule without."""
    gate: Tensor | None
    """[b, t, ·], the mixer's logits; None for a mixer without."""


class Parts(NamedTuple):
    """What stands between a layer's projections.

    out = norm(mix(FW read, KV read))     reads of q by the blend, with activation(v) and β = beta_max · σ(logits)
    """

    activation: nn.Module
    blend: Blend
    mixer: Mixer
    norm: nn.Module
    beta_max: float

    def run(self, given: Projected, state: MemoryState | None, resets: Resets | None) -> tuple[Values, MemoryState]:
        """→ out [b, t, h, v] and the state after the last token, part by part."""
        reads, after = self.read(given, state, resets)
        return self.norm(self.mixer(given.gate, reads)), after

    def read(self, given: Projected, state: MemoryState | None, resets: Resets | None) -> tuple[Reads, MemoryState]:
        """What each memory says, and the state after the last token."""
        beta = self.strengths(given.v, given.beta)
        return self.blend(given.q, given.k, self.activation(given.v), beta, state, resets)

    def strengths(self, v: Values, logits: Strengths | None) -> Strengths:
        """β [b, t, h], in at least float32; ones for a rule without."""
        if logits is None:
            return v.new_ones(v.shape[:3], dtype=at_least_float32(v.dtype))
        return self.beta_max * logits.to(at_least_float32(logits.dtype)).sigmoid()

    def observed(self) -> bool:
        """Whether somebody listens to a part: then it must run by itself."""
        return any(part._forward_hooks or part._forward_pre_hooks for part in self[:4])


Fused: TypeAlias = Callable[[Parts, Projected, MemoryState | None, Resets | None], tuple[Values, MemoryState] | None]
"""What `Parts.run` does, in one piece; None where it does not serve these parts or this call."""
