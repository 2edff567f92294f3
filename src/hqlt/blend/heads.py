"""From a layer's projections to its heads: what stands between, run part by part or by something fused."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from torch import Tensor, nn
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)

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

    def watched(self) -> bool:
        """Whether a part has hooks (its own, or those of all modules) or a `forward` of its own.

        Then it must be called, and nothing fused runs. (What watches tensors instead, `hqlt.native.is_traced` knows.)
        """
        if _global_forward_hooks or _global_forward_pre_hooks or _global_backward_hooks or _global_backward_pre_hooks:
            return True
        activation, blend, mixer, norm, _ = self
        for part in (activation, blend, mixer, norm, *blend._modules.values()):
            if part is None:
                continue
            own = part.__dict__
            if (
                own["_forward_hooks"]
                or own["_forward_pre_hooks"]
                or own["_backward_hooks"]
                or own["_backward_pre_hooks"]
            ):
                return True
            if "forward" in own:
                return True
        return False


Fused: TypeAlias = Callable[[Parts, Projected, MemoryState | None, Resets | None], tuple[Values, MemoryState] | None]
"""What `Parts.run` does, in one piece; None where it does not serve these parts or this call."""
