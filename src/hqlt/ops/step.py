"""One token through everything between a layer's projections, in C++ (`hqlt/native/step.h`).

Its readable twins are the parts one by one: the blends and mixers of `hqlt.blend`, and RMSNorm.
"""

from __future__ import annotations

import functools
import operator
import struct
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from hqlt import native, shapes
from hqlt.ops import backend
from hqlt.shapes import Keys, KeySum, Matrix, Queries, Resets, Strengths, Values

WRITES = (None, "own", "leaving", "chunk")
RULES = ("delta", "linear")
MIXERS = (None, "sum", "scalar", "vector")
DTYPES = (torch.float32, torch.float64)
EVERYTHING = 2**62
NOTHING = torch.empty(0)  # stands for what is not there; its address is 0

# What the kernel is given, OneTokenJob of native/memories.cpp: sizes, then factors and addresses.
SIZES, FACTORS_AND_ADDRESSES = struct.Struct("11q"), struct.Struct("2d22P")

Layout: TypeAlias = tuple[tuple[int, ...], torch.dtype, bool]
layout_of = operator.attrgetter("shape", "dtype", "is_cpu")


class Held(NamedTuple):
    """What a layer holds between two tokens, as in `hqlt.memory.MemoryState`."""

    keys: Tensor  # [b, s, h, k], before φ and before rotary positions; the latest in slot s−1
    values: Tensor  # [b, s, h, v]
    betas: Tensor  # [b, s, h], or [b, s, 0] where they are not kept
    matrix: Matrix  # [b, h, k, v], or [b, 0, k, v] without an FW-memory
    key_sum: KeySum  # [b, h, k], or [b, h, 0] for the delta rule
    position: Tensor  # [b]


class Schedule(NamedTuple):
    """What happens to a token: the blend and the mixer, as the kernel knows them."""

    writes: str | None
    """What the FW-memory writes before it is read: its "own" pair, the one "leaving" the window, a whole "chunk" when
    the next one begins; None: there is no FW-memory."""
    attends: bool
    """Whether there is a KV-memory."""
    window: int | None
    """Pairs that the KV-memory reaches, the own one included; None: all."""
    rule: str
    """The FW-memory's write rule, and with it φ: "delta" or "linear"."""
    mixer: str | None
    """How two reads become one: "vector", "scalar" or "sum"; None: there is one memory."""


def step(
    q: Queries,
    k: Keys,
    v: Values,
    beta: Strengths | None,
    gate: Tensor | None,
    norm: Tensor | None,
    held: Held | tuple[Tensor, ...],
    schedule: Schedule,
    *,
    beta_max: float = 1.0,
    norm_eps: float = 0.0,
    rotary: tuple[Tensor, Tensor] | None = None,
    resets: Resets | None = None,
) -> tuple[Values, list[Tensor]] | None:
    """What the memories say of one token, mixed and normed, and what is held after it. None where this does not serve.

        v ← SiLU(v), where there is an FW-memory      β = beta_max · σ(beta), for the delta rule
        out = RMSNorm(mix(FW read of q, KV read of q))

    It serves one token on a CPU, float32 or float64 throughout, without gradients and tracing, where no implementation
    is forced by name. Anything else, shapes that do not fit included, is its twin's to run or to refuse.

    q, k: [b, 1, h, k], v: [b, 1, h, v], beta: [b, 1, h] as projected (beta None where no rule asks). gate: the mixer's
    logits, [b, 1, h·v] of "vector", [b, 1, 2h] of "scalar", FW heads first. norm: [v], the weight of the RMSNorm over
    each head; None for none. rotary: (cos, sin) of at least s + 1 positions [·, 1, k/2]; None for no positions.
    resets: Bool[b, 1].

    → out [b, 1, h, v], and what is held then, in tensors of their own: what was given is left as it was.
    """
    optional = beta, gate, norm, resets, *(rotary or (None, None))
    given = [q, k, v, *held, *[NOTHING if x is None else x for x in optional]]
    if backend._forced is not None or shapes._finite_checks or not (native.is_plain(*given) and native.available()):
        return None
    sizes = _sizes(schedule, tuple(map(layout_of, given)))
    if sizes is None:
        return None
    if not all(map(Tensor.is_contiguous, given)):
        given = [x.contiguous() for x in given]
    out, after = torch.empty_like(given[2]), [torch.empty_like(x) if x.numel() else x for x in given[3:9]]
    if schedule.attends and schedule.window is None:
        after[:3] = [x.new_empty(len(x), x.shape[1] + 1, *x.shape[2:]) for x in after[:3]]
    addresses = map(Tensor.data_ptr, (*given, out, *after))
    native.one_token(q.dtype is torch.float64, sizes + FACTORS_AND_ADDRESSES.pack(beta_max, norm_eps, *addresses))
    return out, after


@functools.lru_cache(maxsize=256)
def _sizes(schedule: Schedule, given: tuple[Layout, ...]) -> bytes | None:
    """The kernel's sizes, where everything has the shape, type and place that it reads and writes; otherwise None."""
    (q_shape, dtype, _), _, (v_shape, *_), (keys_shape, *_), *_ = given
    *state_and_own, beta, gate, norm, resets, cos, sin = given
    writes, attends, window, rule, mixer = schedule
    if not len(q_shape) == len(v_shape) == len(keys_shape) == 4 or dtype not in DTYPES or q_shape[0] == 0:
        return None
    (b, _, h, k), v, s = q_shape, v_shape[3], keys_shape[1]
    delayed, delta, linear = writes in ("leaving", "chunk"), writes and rule == "delta", writes and rule == "linear"
    if (delayed and (window is None or not attends)) or (mixer and not (writes and attends)):
        return None
    slots = 0 if not attends else s if window is None else window if delayed else window - 1

    def of(*shape: int, dtype: torch.dtype = dtype) -> Layout:
        return shape, dtype, True

    nothing = layout_of(NOTHING)
    gates = {"vector": of(b, 1, h * v), "scalar": of(b, 1, 2 * h)}
    fits = (
        s == slots
        and state_and_own
        == [
            of(b, 1, h, k),
            of(b, 1, h, k),
            of(b, 1, h, v),
            of(b, s, h, k),
            of(b, s, h, v),
            of(b, s, h if writes == "chunk" else 0),
            of(b, h if writes else 0, k, v),
            of(b, h if writes else 0, k if linear else 0),
            of(b, dtype=torch.int64),
        ]
        and beta == (of(b, 1, h) if delta else nothing)
        and gate == gates.get(mixer or "", nothing)
        and norm in (nothing, of(v))
        and resets in (nothing, of(b, 1, dtype=torch.bool))
        and cos == sin
        and (cos == nothing or (cos == of(cos[0][0], 1, k // 2) and cos[0][0] > s))
    )
    if not fits:
        return None
    s_after, reach = (s + 1, EVERYTHING) if attends and window is None else (s, window or EVERYTHING)
    names = WRITES.index(writes), attends, RULES.index(rule), MIXERS.index(mixer)
    return SIZES.pack(b, h, k, v, s, s_after, reach, *names)
