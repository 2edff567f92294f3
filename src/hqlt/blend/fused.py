"""What runs the parts between a layer's projections in one piece. Their readable twin is `Parts.run`."""

from __future__ import annotations

from collections.abc import Callable
from types import NoneType
from typing import Any

import torch
from torch import nn
from torch.compiler import is_compiling
from torch.utils.hooks import RemovableHandle

from hqlt.blend.alone import FWOnly, KVOnly
from hqlt.blend.delayed_chunk import DelayedChunk
from hqlt.blend.delayed_streaming import DelayedStreaming
from hqlt.blend.heads import Fused, HeadNorm, Parts, Projected
from hqlt.blend.mixer import NoMixer, ScalarMixer, SumMixer, VectorMixer
from hqlt.blend.synchronous import Synchronous
from hqlt.memory import DeltaMemory, FWMemory, KVMemory, LinearMemory, MemoryState
from hqlt.memory.kv import rotary_table
from hqlt.ops.step import NOTHING, Given, Layout, Plan, Schedule, layout_of, may_run, plan, run
from hqlt.shapes import Resets, Values

WRITES = {Synchronous: "own", FWOnly: "own", DelayedStreaming: "leaving", DelayedChunk: "chunk", KVOnly: None}
RULES = {DeltaMemory: "delta", LinearMemory: "linear", NoneType: "delta"}
MIXERS = {VectorMixer: "vector", ScalarMixer: "scalar", SumMixer: "sum", NoMixer: None}


class OneToken:
    """One token by `hqlt.ops.step`, where the parts are known and nobody listens to them.

    It remembers how the last call looked, and what that meant: as long as calls look the same, comparing is all. (Every
    microsecond is one in a hundred here, and nn.Module's own look-up of `blend.kv` takes one.)
    """

    def __init__(self) -> None:
        self.last: tuple[Any, Plan | None] = (None, None)

    def __reduce__(self) -> tuple[Any, ...]:
        return OneToken, ()  # a copy of a layer has parts of its own

    def __call__(
        self, parts: Parts, projected: Projected, state: MemoryState | None, resets: Resets | None
    ) -> tuple[Values, MemoryState] | None:
        if is_compiling() or state is None or projected.q.shape[1] != 1:
            return None
        q, k, v, beta, gate = projected
        memories: dict[str, Any] = parts.blend._modules
        kv, fw, norm = memories.get("kv"), memories.get("fw"), parts.norm
        weight, norm_eps = (norm.weight, norm.eps) if isinstance(norm, HeadNorm) else (NOTHING, 0.0)
        optional = NOTHING if beta is None else beta, NOTHING if gate is None else gate
        given = Given._make((q, k, v, *optional, weight, NOTHING if resets is None else resets, *state[:6]))
        reach = (None, None) if kv is None else (kv.window, kv.rope_theta)
        hooks = RemovableHandle.next_id  # it grows whenever somebody begins to listen
        look = parts, kv, fw, reach, norm_eps, hooks, tuple(map(layout_of, given))
        seen, plan = self.last
        if look != seen or plan is None:
            plan = None if parts.observed() else plan_of(parts, kv, fw, reach, norm_eps, look[-1])
            self.last = look, plan
        if plan is None or not may_run(given):
            return None
        out, held = run(plan, given)
        return out, MemoryState._make([*held, state.convolution])


def plan_of(
    parts: Parts,
    kv: KVMemory | None,
    fw: FWMemory | None,
    reach: tuple[int | None, float | None],
    norm_eps: float | None,
    layouts: tuple[Layout, ...],
) -> Plan | None:
    """How the kernel runs these parts on tensors of these layouts; None where it does not know them."""
    activation, blend, mixer, norm, beta_max = parts
    known = type(blend) in WRITES and type(fw) in RULES and type(mixer) in MIXERS and type(kv) in (KVMemory, NoneType)
    usual = type(activation) is (nn.SiLU if fw else nn.Identity) and type(norm) in (HeadNorm, nn.Identity)
    if not (known and usual) or norm_eps is None:
        return None
    window, theta = reach
    rotary = (NOTHING, NOTHING)
    if theta is not None:
        _, (*_, width), dtype, _ = layouts[0]
        rows = 1 << layouts[7][1][1].bit_length()  # one for each age, and few tables where pairs grow in number
        rotary = rotary_table(rows, width, theta, torch.device("cpu"), dtype)
    schedule = Schedule(WRITES[type(blend)], kv is not None, window, RULES[type(fw)], MIXERS[type(mixer)])
    return plan(schedule, layouts, beta_max=beta_max, norm_eps=norm_eps, rotary=rotary)


FUSED: tuple[Callable[[], Fused], ...] = (OneToken,)
"""A layer has one of each; the first that serves a call runs it."""
