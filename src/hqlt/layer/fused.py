"""Fused forms of the parts between a layer's projections. Their readable reference is `Parts.run`.

Each part names its own form in these operations: `native`, one of the names in `hqlt.ops.step`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hqlt.blend import Memories, Synchronous, Timeline
from hqlt.layer.norm import RMSNorm
from hqlt.layer.parts import Fused, Parts, Projected, native_form
from hqlt.memory import Candidates, Held, KVMemory, MemoryState
from hqlt.memory.fw import MatrixState
from hqlt.memory.rotary import Rotary, Table
from hqlt.mixer import VectorMixer
from hqlt.ops import Beyond, explain, mix, synchronous
from hqlt.ops.step import (
    FIRST_HELD,
    NOTHING,
    Layout,
    Plan,
    Retained,
    Schedule,
    digits,
    layout_of,
    may_run,
    plan,
    run,
)
from hqlt.ops.synchronous.step import step
from hqlt.shapes import Keys, Resets, Values

Numbers: TypeAlias = tuple[Rotary | None, float, float, Retained | None]


class OneTokenStep:
    """A single token by `hqlt.ops.step`, if all parts have a native form.

    Caches the plan of the last call, which is reused as long as the parts and the layouts of the tensors are the same.
    """

    def __init__(self) -> None:
        self.supported: tuple[Any, bool] = (None, False)
        self.last: tuple[Any, Plan | None] = (None, None)

    def __reduce__(self) -> tuple[Any, ...]:
        return OneTokenStep, ()  # a copy of the layer must not share this cache

    def __call__(
        self, parts: Parts, projected: Projected, state: MemoryState | None, resets: Resets | None
    ) -> tuple[Values, MemoryState] | None:
        if state is None or projected.q.shape[1] != 1 or not self.supports(key := (parts, step_numbers(parts))):
            return None
        q, k, v, write, gate = projected
        kv, fw, norm = state.kv, state.fw, parts.norm
        keys, values, gates, kept = kv or (NOTHING, NOTHING, (), ())
        beta, decay = (write, NOTHING) if isinstance(write, Tensor) else (*write, NOTHING, NOTHING)[:2]
        weights: dict[str, Any] = {} if parts.fw is None else parts.fw._parameters
        A_log, dt_bias = weights.get("A_log", NOTHING), weights.get("dt_bias", NOTHING)
        learned = parts.feature_map
        maps = (NOTHING, NOTHING) if learned is None else (learned.q, learned.k)
        betas = gates[0] if gates else NOTHING
        matrix, key_sum = (*fw, NOTHING, NOTHING)[:2]
        weight = norm.weight if type(norm) is RMSNorm else NOTHING
        gate, resets = NOTHING if gate is None else gate, NOTHING if resets is None else resets
        own = q, k, v, beta, decay, A_log, dt_bias, *maps, gate, weight, resets
        given = *own, keys, values, betas, matrix, key_sum, state.position, *kept
        if not may_run(given):
            return None
        call = *key, tuple(map(layout_of, given))
        last, plan = self.last
        if call != last:
            plan = plan_of(*call)
            self.last = call, plan
        if plan is None:
            return None
        out, (keys, values, betas, matrix, key_sum, position, *kept_then) = run(plan, given)
        gates, kept = type(gates)(betas) if gates else (), type(kept)._make(kept_then) if kept else ()
        held = Held(keys, values, gates, kept) if kv else ()
        written = type(fw)._make((matrix, key_sum)[: len(fw)]) if fw else ()
        return out, MemoryState(held, written, state.convolution, position)

    def supports(self, key: tuple[Parts, Numbers]) -> bool:
        """Return whether every part has a native form; otherwise gates and states may be of any kind."""
        last, supported = self.supported
        if last != key:
            supported = not without_native_form(key[0])
            self.supported = key, supported
        return supported


def step_numbers(parts: Parts) -> Numbers:
    """Return the settings of parts that may change after construction: rotary positions, maximum of β, ε of the norm,
    and what is kept beyond the window."""
    _, kv, fw, _, _, norm = [{} if part is None else part.__dict__ for part in parts]
    retained = None
    if kv.get("kept"):
        score = native_form(parts.retention) or ""
        retained = Retained(score, kv["sinks"], kv["kept_alike"], kv["kept_positions"])
    return kv.get("positions"), fw.get("beta_max", 1.0), norm.get("eps", 0.0), retained


def plan_of(parts: Parts, numbers: Numbers, layouts: tuple[Layout, ...]) -> Plan | None:
    """Return how the kernel runs these parts on tensors of these layouts; None if it does not support them."""
    (_, kv, fw, blend, mixer, _), (positions, beta_max, norm_eps, retained) = parts, numbers
    rotary: tuple[Tensor, ...] = (NOTHING, NOTHING) * (2 if retained else 1)
    if positions is not None:
        (_, (*_, width), dtype, _), (_, keys, _, _) = layouts[0], layouts[FIRST_HELD]
        rows = 1 << keys[1].bit_length()  # one per age; powers of two, so that a growing state needs few tables
        rotary = positions.table(rows, width, torch.device("cpu"), dtype)
        if retained:
            rotary += _waves_of_digits(positions, width, dtype)
    writes, rule, mixed = native_form(blend) or "", native_form(fw) or "delta", native_form(mixer) or ""
    activated = ACTIVATED[activations_of(parts)]
    schedule = Schedule(writes, kv is not None, blend.window, rule, mixed, activated, retained)
    return plan(schedule, layouts, beta_max=beta_max, norm_eps=norm_eps, rotary=rotary)


@functools.lru_cache(maxsize=16)
def _waves_of_digits(positions: Rotary, width: int, dtype: torch.dtype) -> Table:
    return positions.cos_sin(digits(), width, dtype)


ACTIVATED = {(nn.Identity, nn.Identity): "none", (nn.SiLU, nn.Identity): "all", (nn.Identity, nn.SiLU): "written"}
"""The native form of the activations of values."""


def activations_of(parts: Parts) -> tuple[type, type]:
    """Return the types of the activations of values, and of those that the FW-memory applies to them."""
    return type(parts.activation), nn.Identity if parts.fw is None else type(parts.fw.v_activation)


def without_native_form(parts: Parts) -> list[str]:
    """Return the names of the parts that `hqlt.ops.step` does not support."""
    _, kv, fw, blend, mixer, norm = parts
    named = {"kv": kv, "fw": fw, "blend": blend, "mixer": mixer, "retention": parts.retention}
    unknown = [name for name, part in named.items() if part is not None and native_form(part) is None]
    unknown += [] if activations_of(parts) in ACTIVATED else ["v_activation"]
    return unknown + ([] if native_form(norm) or type(norm) is nn.Identity else ["o_norm"])


class SynchronousOperation:
    """A synchronous layer by `hqlt.ops.synchronous`, if its Triton kernels can run; a single token without gradients by
    its `step`."""

    def __call__(
        self, parts: Parts, projected: Projected, state: MemoryState | None, resets: Resets | None
    ) -> tuple[Values, MemoryState] | None:
        _, kv, fw, blend, mixer, norm = parts
        if fw is None or type(blend) is not Synchronous or type(mixer) is not VectorMixer or type(norm) is not RMSNorm:
            return None
        if type(kv) is not KVMemory or not kv.reads_uniformly or native_form(fw) not in ("delta", "gated-delta"):
            return None
        if kv.retention is not None and kv.retention.needs_errors:  # needs the FW-memory's predictions
            return None
        if type(fw.v_activation) is not nn.Identity or (kv.positions is not None and kv.positions.fraction != 1):
            return None
        if explain("synchronous", projected.q).name != "triton":
            return None
        assert projected.gate is not None
        new = parts.tokens(projected)
        gate = projected.gate.view(*new.q.shape[:3], -1)
        beta, decay = (*new.gates, None)[:2]
        window, one = blend.window, new.q.shape[1] == 1 and not torch.is_grad_enabled()
        if one and window is not None and state is not None and isinstance(state.kv, Held) and not kv.kept:
            y, keys, values, matrix, position = step(
                new.q, new.keys, new.values, beta, gate, norm.weight, state.kv.keys, state.kv.values, state.fw.matrix,
                state.position, decay=decay, rotary=kv.rotary(window, new.q), norm_eps=norm.eps, resets=resets,
            )  # fmt: skip
            held = state.kv._replace(keys=keys, values=values)
            return y, state._replace(kv=held, fw=MatrixState(matrix), position=position)
        timeline = blend.timeline(new, state, resets)
        candidates = blend.candidates(kv, new, timeline, state, None)
        keys, values, resets, beyond = _entries(kv, timeline, candidates)
        y, matrix = synchronous(
            new.q, keys, values, beta, gate, norm.weight, decay=decay, window=window,
            rotary=kv.rotary(keys.shape[1], new.q), norm_eps=norm.eps,
            state=None if state is None else state.fw.matrix, resets=resets, beyond=beyond,
        )  # fmt: skip
        return y, blend.state_after(Memories(kv, fw), timeline, MatrixState(matrix), candidates)


def _entries(
    kv: KVMemory, timeline: Timeline, candidates: Candidates | None
) -> tuple[Keys, Values, Resets | None, Beyond | None]:
    """Return keys, values and resets for `hqlt.ops.synchronous`, and the entries visible beyond the window."""
    keys, values, _, _, resets = timeline
    if candidates is None:
        return keys, values, resets, None
    kept = candidates.keys.shape[1] - keys.shape[1]
    old = kv.rotate_kept(candidates.keys[:, :kept], candidates, rotated_by_index=True)
    resets = None if resets is None else F.pad(resets, (kept, 0))
    return torch.cat([old, keys], dim=1), candidates.values, resets, Beyond(candidates.expiry, kv.kept)


class FusedMixAndNorm:
    """The parts one by one, with the vector mixer and the norm in one pass."""

    def __call__(
        self, parts: Parts, projected: Projected, state: MemoryState | None, resets: Resets | None
    ) -> tuple[Values, MemoryState] | None:
        mixer, norm, gate = parts.mixer, parts.norm, projected.gate
        if type(mixer) is not VectorMixer or type(norm) is not RMSNorm or gate is None:
            return None
        reads, after = parts.read(projected, state, resets)
        fw, kv = reads.both()
        return mix(fw, kv, gate.view(fw.shape), norm.weight, eps=norm.eps), after


FUSED: tuple[Callable[[], Fused], ...] = (OneTokenStep, SynchronousOperation, FusedMixAndNorm)
"""Every layer has one of each. Unless a part has hooks (`Parts.hooked`), the first that supports a call runs it."""
