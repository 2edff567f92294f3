"""From a layer's projections to its heads: what stands between, run part by part or by something fused."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from hqlt.blend import Blend, Memories, Reads, Tokens
from hqlt.memory import FWMemory, KVMemory, MemoryState, Retention, Tree
from hqlt.mixer import Mixer
from hqlt.shapes import Keys, Queries, Resets, Values


class Projected(NamedTuple):
    """What the projections make of x."""

    q: Queries
    k: Keys
    v: Values
    """[b, t, h, v], before its activation."""
    write: Tree
    """[b, t, …] each, the write rule's logits."""
    gate: Tensor | None
    """[b, t, ·], the mixer's logits; None for a mixer without."""


class Parts(NamedTuple):
    """What stands between a layer's projections.

    out = norm(mix(FW read, KV read))     reads of q by the blend, with activation(v) and the rule's gates
    """

    activation: nn.Module
    kv: KVMemory | None
    fw: FWMemory | None
    blend: Blend
    mixer: Mixer
    norm: nn.Module

    @property
    def retention(self) -> Retention | None:
        """The KV-memory's, where it keeps entries beyond the window."""
        return self.kv and self.kv._modules.get("retention")  # type: ignore[return-value]

    def run(self, given: Projected, state: MemoryState | None, resets: Resets | None) -> tuple[Values, MemoryState]:
        """→ out [b, t, h, v] and the state after the last token, part by part."""
        reads, after = self.read(given, state, resets)
        if self.mixer.norms_fw:
            return self.mixer(given.gate, reads._replace(fw=self.norm(reads.fw))), after
        return self.norm(self.mixer(given.gate, reads)), after

    def read(self, given: Projected, state: MemoryState | None, resets: Resets | None) -> tuple[Reads, MemoryState]:
        """What each memory says, and the state after the last token."""
        return self.blend(Memories(self.kv, self.fw), self.tokens(given), state, resets)

    def tokens(self, given: Projected) -> Tokens:
        gates = () if self.fw is None else self.fw.gates(given.write)
        return Tokens(given.q, given.k, self.activation(given.v), gates)

    def hooked(self) -> bool:
        """Whether a part has hooks (its own, or those of all modules), or a `forward` or `score` of its own.

        Then it must be called, and nothing fused runs. (What watches tensors instead, `hqlt.native.is_traced` knows.)
        """
        parts = *self, self.retention
        return _has_any_global_hook() or any([has_hooks(part) for part in parts if part is not None])  # noqa: C419


def has_hooks(part: nn.Module) -> bool:
    """Whether a module has hooks, or a `forward` or `score` of its own."""
    own = part.__dict__
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
        or "score" in own
    )


def native_form(part: nn.Module | None) -> str | None:
    """What `hqlt.ops.step` calls a part; None where its class says nothing itself, because a subclass may differ."""
    return part.native if part is not None and "native" in vars(type(part)) else None  # type: ignore[return-value]


Fused: TypeAlias = Callable[[Parts, Projected, MemoryState | None, Resets | None], tuple[Values, MemoryState] | None]
"""What `Parts.run` does, in one piece; None where it does not serve these parts or this call."""
