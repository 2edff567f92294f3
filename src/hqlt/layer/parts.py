"""The parts of a layer between its projections, run one by one or as a fused operation."""

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
    """The projections of x."""

    q: Queries
    """[b, t, g·h, k]"""
    k: Keys
    """[b, t, h, k]"""
    v: Values
    """[b, t, h, v] before the activation"""
    write: Tree
    """The write rule's logits, [b, t, …] each."""
    gate: Tensor | None
    """The mixer's logits [b, t, ·]; None for a mixer without gates."""


class Parts(NamedTuple):
    """The parts between the projections: out = norm(mix(FW read, KV read)), where the blend reads both memories."""

    activation: nn.Module
    """Of the values."""
    kv: KVMemory | None
    """The KV-memory; None for "fw-only"."""
    fw: FWMemory | None
    """The FW-memory; None for "kv-only"."""
    blend: Blend
    """When tokens reach each memory."""
    mixer: Mixer
    """How the reads are combined."""
    norm: nn.Module
    """Of the mixed reads (of the FW read if `mixer.norms_fw`)."""

    @property
    def retention(self) -> Retention | None:
        """The retention of the KV-memory; None if it keeps no entries beyond the window."""
        return self.kv and self.kv._modules.get("retention")  # type: ignore[return-value]

    @property
    def feature_map(self) -> nn.Module | None:
        """The learned feature map of the FW-memory; None if there is none."""
        return self.fw and self.fw._modules.get("feature_map")

    def run(self, given: Projected, state: MemoryState | None, resets: Resets | None) -> tuple[Values, MemoryState]:
        """Run the parts one by one: return out [b, t, h, v] and the state after the last token."""
        reads, after = self.read(given, state, resets)
        if self.mixer.norms_fw:
            return self.mixer(given.gate, reads._replace(fw=self.norm(reads.fw))), after
        return self.norm(self.mixer(given.gate, reads)), after

    def read(self, given: Projected, state: MemoryState | None, resets: Resets | None) -> tuple[Reads, MemoryState]:
        """Return the read of each memory, and the state after the last token."""
        return self.blend(Memories(self.kv, self.fw), self.tokens(given), state, resets)

    def tokens(self, given: Projected) -> Tokens:
        """Return what the blend is given of the new tokens."""
        gates = () if self.fw is None else self.fw.gates(given.write)
        return Tokens(given.q, given.k, self.activation(given.v), gates)

    def hooked(self) -> bool:
        """Return whether a part has hooks (its own or global ones) or a replaced `forward` or `score`.

        Then the part must be called, and no fused operation may run. (`hqlt.native.is_traced` tells whether tensors are
        traced instead.)
        """
        of_fw = () if self.fw is None else (self.feature_map, self.fw._modules.get("v_activation"))
        parts = *self, self.retention, *of_fw
        return _has_any_global_hook() or any([has_hooks(part) for part in parts if part is not None])  # noqa: C419


def has_hooks(part: nn.Module) -> bool:
    """Return whether a module has hooks, or a replaced `forward` or `score`."""
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
    """Return the name of a part in `hqlt.ops.step`; None unless its own class defines one (a subclass may differ)."""
    return part.native if part is not None and "native" in vars(type(part)) else None  # type: ignore[return-value]


Fused: TypeAlias = Callable[[Parts, Projected, MemoryState | None, Resets | None], tuple[Values, MemoryState] | None]
"""A fused form of `Parts.run`; returns None if it does not support these parts or this call."""
