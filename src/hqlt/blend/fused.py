"""What runs the parts between a layer's projections in one piece. Their readable twin is `Parts.run`."""

from __future__ import annotations

from collections.abc import Callable
from types import NoneType
from typing import Any

import torch
from torch import nn

from hqlt.blend.alone import FWOnly, KVOnly
from hqlt.blend.delayed_chunk import DelayedChunk
from hqlt.blend.delayed_streaming import DelayedStreaming
from hqlt.blend.heads import Fused, Parts, Projected
from hqlt.blend.mixer import NoMixer, ScalarMixer, SumMixer, VectorMixer
from hqlt.blend.synchronous import Synchronous
from hqlt.memory import DeltaMemory, FastWeights, FWMemory, KVMemory, LinearMemory, MemoryState
from hqlt.memory.kv import rotary_table
from hqlt.norm import RMSNorm
from hqlt.ops import explain, mix, synchronous
from hqlt.ops.step import NOTHING, Given, Layout, Plan, Schedule, layout_of, may_run, plan, run
from hqlt.shapes import Resets, Values

WRITES = {Synchronous: "own", FWOnly: "own", DelayedStreaming: "leaving", DelayedChunk: "chunk", KVOnly: None}
RULES = {DeltaMemory: "delta", LinearMemory: "linear", NoneType: "delta"}
MIXERS = {VectorMixer: "vector", ScalarMixer: "scalar", SumMixer: "sum", NoMixer: None}


class OneToken:
    """One token by `hqlt.ops.step`, where the parts are known.

    It remembers how the last call looked, and what that meant: as long as calls look the same, comparing is all.
    """

    def __init__(self) -> None:
        self.last: tuple[Any, Plan | None] = (None, None)

    def __reduce__(self) -> tuple[Any, ...]:
        return OneToken, ()  # a copy of a layer has parts of its own

    def __call__(
        self, parts: Parts, projected: Projected, state: MemoryState | None, resets: Resets | None
    ) -> tuple[Values, MemoryState] | None:
        if state is None or projected.q.shape[1] != 1:
            return None
        q, k, v, beta, gate = projected
        kv, fw, norm = parts.blend.kv, parts.blend.fw, parts.norm
        weight, norm_eps = (norm.weight, norm.eps) if type(norm) is RMSNorm else (NOTHING, 0.0)
        beta, gate, resets = (NOTHING if x is None else x for x in (beta, gate, resets))
        given = Given._make((q, k, v, beta, gate, weight, resets, *state[:6]))
        if not may_run(given):
            return None
        reach = (None, None) if kv is None else (kv.window, kv.rope_theta)
        look = parts, kv, fw, reach, norm_eps, tuple(map(layout_of, given))
        seen, plan = self.last
        if look != seen:
            plan = plan_of(*look)
            self.last = look, plan
        if plan is None:
            return None
        out, held = run(plan, given)
        return out, MemoryState._make([*held, state.convolution])


def plan_of(
    parts: Parts,
    kv: KVMemory | None,
    fw: FWMemory | None,
    reach: tuple[int | None, float | None],
    norm_eps: float,
    layouts: tuple[Layout, ...],
) -> Plan | None:
    """How the kernel runs these parts on tensors of these layouts; None where it does not know them."""
    activation, blend, mixer, norm, beta_max = parts
    known = type(blend) in WRITES and type(fw) in RULES and type(mixer) in MIXERS and type(kv) in (KVMemory, NoneType)
    usual = type(activation) is (nn.SiLU if fw else nn.Identity) and type(norm) in (RMSNorm, nn.Identity)
    if not (known and usual):
        return None
    window, theta = reach
    rotary = (NOTHING, NOTHING)
    if theta is not None:
        _, (*_, width), dtype, _ = layouts[0]
        rows = 1 << layouts[7][1][1].bit_length()  # one for each age, and few tables where pairs grow in number
        rotary = rotary_table(rows, width, theta, torch.device("cpu"), dtype)
    schedule = Schedule(WRITES[type(blend)], kv is not None, window, RULES[type(fw)], MIXERS[type(mixer)])
    return plan(schedule, layouts, beta_max=beta_max, norm_eps=norm_eps, rotary=rotary)


class InOneOperation:
    """A synchronous layer by `hqlt.ops.synchronous`, where an implementation runs that does more than the parts do."""

    def __call__(
        self, parts: Parts, projected: Projected, state: MemoryState | None, resets: Resets | None
    ) -> tuple[Values, MemoryState] | None:
        _, blend, mixer, norm, _ = parts
        kv, fw, gate = blend.kv, blend.fw, projected.gate
        if not (type(blend) is Synchronous and type(mixer) is VectorMixer and type(norm) is RMSNorm):
            return None
        if type(kv) is not KVMemory or type(fw) is not DeltaMemory or gate is None:
            return None
        q = projected.q
        if explain("synchronous", q).name != "triton":
            return None
        v = parts.activation(projected.v)
        beta = parts.strengths(v, projected.beta)
        timeline = blend.timeline(projected.k, v, beta, state, resets)
        y, matrix = synchronous(
            q, timeline.keys, timeline.values, beta, gate.view(v.shape), norm.weight,
            window=kv.window, rotary=kv.rotary(timeline.keys.shape[1], q), norm_eps=norm.eps,
            state=None if state is None else state.fast_weights, resets=timeline.resets,
        )  # fmt: skip
        return y, blend.state_after(timeline, FastWeights(matrix, matrix.new_zeros(*matrix.shape[:2], 0)))


class MixedAndNormed:
    """Vector mixer and norm in one pass."""

    def __call__(
        self, parts: Parts, projected: Projected, state: MemoryState | None, resets: Resets | None
    ) -> tuple[Values, MemoryState] | None:
        mixer, norm, gate = parts.mixer, parts.norm, projected.gate
        if type(mixer) is not VectorMixer or type(norm) is not RMSNorm or gate is None:
            return None
        reads, after = parts.read(projected, state, resets)
        fw, kv = reads.both()
        return mix(fw, kv, gate.view(fw.shape), norm.weight, eps=norm.eps), after


FUSED: tuple[Callable[[], Fused], ...] = (OneToken, InOneOperation, MixedAndNormed)
"""A layer has one of each. Where nobody watches its parts (`Parts.watched`), the first that serves a call runs it."""
