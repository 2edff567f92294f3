"""What runs the parts between a layer's projections in one piece. Their readable twin is `Parts.run`."""

from __future__ import annotations

import functools
from types import NoneType
from typing import Any

import torch
from torch import nn

from hqlt.blend.alone import FWOnly, KVOnly
from hqlt.blend.delayed_chunk import DelayedChunk
from hqlt.blend.delayed_streaming import DelayedStreaming
from hqlt.blend.heads import Fused, HeadNorm, Parts, Projected
from hqlt.blend.mixer import NoMixer, ScalarMixer, SumMixer, VectorMixer
from hqlt.blend.synchronous import Synchronous
from hqlt.memory import DeltaMemory, KVMemory, LinearMemory, MemoryState
from hqlt.memory.kv import rotary_table
from hqlt.ops.step import Schedule, step
from hqlt.shapes import Resets, Values

WRITES = {Synchronous: "own", FWOnly: "own", DelayedStreaming: "leaving", DelayedChunk: "chunk", KVOnly: None}
RULES = {DeltaMemory: "delta", LinearMemory: "linear", NoneType: "delta"}
MIXERS = {VectorMixer: "vector", ScalarMixer: "scalar", SumMixer: "sum", NoMixer: None}


def one_token(
    parts: Parts, given: Projected, state: MemoryState | None, resets: Resets | None
) -> tuple[Values, MemoryState] | None:
    """One token by `hqlt.ops.step`, where the parts are known and nobody listens to them."""
    q = given.q
    if torch.compiler.is_compiling() or state is None or q.shape[1] != 1 or not q.is_cpu:
        return None
    activation, blend, mixer, norm, beta_max = parts
    kv = blend.kv
    schedule = _schedule(tuple(map(type, (activation, blend, kv, blend.fw, mixer, norm))), kv and kv.window)
    weight, norm_eps = (norm.weight, norm.eps) if isinstance(norm, HeadNorm) else (None, 0.0)
    if schedule is None or norm_eps is None or parts.observed():
        return None
    rotary = None
    if kv is not None and kv.rope_theta is not None:
        rows = 1 << state.keys.shape[1].bit_length()  # one for each age, and few tables where pairs grow in number
        rotary = rotary_table(rows, q.shape[3], kv.rope_theta, q.device, q.dtype)
    stepped = step(
        *given, weight, state[:6], schedule, beta_max=beta_max, norm_eps=norm_eps, rotary=rotary, resets=resets
    )
    if stepped is None:
        return None
    out, held = stepped
    return out, MemoryState._make([*held, state.convolution])


@functools.lru_cache
def _schedule(types: tuple[Any, ...], window: int | None) -> Schedule | None:
    """What the kernel calls parts of these types; None where it does not know one."""
    activation, blend, kv, fw, mixer, norm = types
    known = blend in WRITES and kv in (KVMemory, NoneType) and fw in RULES and mixer in MIXERS
    usual = activation is (nn.Identity if fw is NoneType else nn.SiLU) and norm in (HeadNorm, nn.Identity)
    return Schedule(WRITES[blend], kv is KVMemory, window, RULES[fw], MIXERS[mixer]) if known and usual else None


FUSED: tuple[Fused, ...] = (one_token,)
"""The first that serves a call runs it."""
