"""One token through everything between a layer's projections, in C++ (`hqlt/native/step.h`).

    v ← SiLU(v), where there is an FW-memory      β = beta_max · σ(beta), for the delta rules
    log α = −exp(A_log) · softplus(decay + dt_bias), for the gated one
    out = RMSNorm(mix(FW read of q, KV read of q))

and which entries stay visible beyond the window, where any do.

Its readable twins are the parts one by one: the blends and mixers of `hqlt.blend`, and RMSNorm. So little is computed
that looking at shapes takes as long: `plan` looks once, `run` is for all calls whose layouts are the same.
"""

from __future__ import annotations

import operator
import struct
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import Parameter

from hqlt import native, shapes
from hqlt.ops import backend
from hqlt.shapes import Keys, KeySum, Matrix, Queries, Resets, Strengths, Values

WRITES = ("nothing", "own", "leaving", "chunk")
RULES = ("delta", "linear", "gated-delta")
MIXERS = ("alone", "sum", "scalar", "vector")
RETENTIONS = ("recent", "error", "beta-error", "value-norm", "random")
POSITIONS = ("true", "clamped", "none")
DIGITS, LEVELS = 64, 11
"""A distance in this base, of 63 bits: the kernel multiplies a digit's rotations."""
EVERYTHING = 2**62
NOTHING = torch.empty(0, device="cpu")  # stands for what is not there; its address is 0

# OneTokenJob of native/memories.cpp.
SIZES_AND_FACTORS, ADDRESSES, MORE_ADDRESSES = struct.Struct("16q2d"), struct.Struct("25P"), struct.Struct("35P")

Layout: TypeAlias = tuple[type, tuple[int, ...], torch.dtype, bool]
layout_of = operator.attrgetter("__class__", "shape", "dtype", "is_cpu")


class Given(NamedTuple):
    """What a token brings and what a layer holds; `NOTHING` in place of what is not there."""

    q: Queries  # [b, 1, h, k], as projected, and so are k, v, beta, decay and gate
    k: Keys  # [b, 1, h, k]
    v: Values  # [b, 1, h, v]
    beta: Strengths  # [b, 1, h], for the delta rules
    decay: Strengths  # [b, 1, h], for the gated delta rule
    A_log: Tensor  # [h], and so is dt_bias: its weights
    dt_bias: Tensor
    gate: Tensor  # [b, 1, h·v] for the "vector" mixer; [b, 1, 2h] for the "scalar" one, FW heads first
    norm: Tensor  # [v], the weight of an RMSNorm over each head
    resets: Resets  # Bool[b, 1]
    keys: Tensor  # [b, s, h, k], before φ and before rotary positions; the latest in slot s−1
    values: Tensor  # [b, s, h, v]
    betas: Tensor  # [b, s, h], where a delta rule writes a whole chunk
    matrix: Matrix  # [b, h, k, v]
    key_sum: KeySum  # [b, h, k], for linear attention
    position: Tensor  # [b]


class GivenKept(NamedTuple):
    """What is given behind those, where entries stay visible beyond the window; s: the recent ones."""

    kept_keys: Tensor  # [b, K, h, k]
    kept_values: Tensor  # [b, K, h, v]
    kept_positions: Tensor  # int64 [b, K, h]
    kept_scores: Tensor  # [b, K + s, h]


VALUES, FIRST_HELD = map(Given._fields.index, ("v", "keys"))


class Retained(NamedTuple):
    """Which entries stay visible beyond the window, and how they are read."""

    score: str
    """What an entry is worth: one of `RETENTIONS`."""
    sinks: int
    """The first entries of a segment are worth most."""
    alike: bool
    """Whether all heads keep the same entries, by the mean of their scores."""
    positions: str
    """The distance at which they are read: one of `POSITIONS`."""


class Schedule(NamedTuple):
    """What happens to a token: the blend and the mixer, as the kernel knows them."""

    writes: str
    """What the FW-memory writes before it is read: its "own" pair, the one "leaving" the window, a whole "chunk" when
    the next one begins; "nothing": there is no FW-memory."""
    attends: bool
    """Whether there is a KV-memory."""
    window: int | None
    """Pairs that the KV-memory reaches, the own one included; None: all."""
    rule: str
    """The FW-memory's write rule, and with it φ: "delta", "linear" or "gated-delta" (which writes no whole chunk)."""
    mixer: str
    """How two reads become one: "vector", "scalar" or "sum"; "alone": there is one memory."""
    retained: Retained | None = None
    """None: nothing stays visible beyond the window."""


class Plan(NamedTuple):
    """How the kernel is called."""

    head: bytes
    """Sizes and factors."""
    is_double: bool
    grows: bool
    """Whether no pair ever falls out."""
    tables: tuple[Tensor, ...]
    addresses: struct.Struct


def plan(
    schedule: Schedule,
    layouts: tuple[Layout, ...],
    *,
    beta_max: float = 1.0,
    norm_eps: float = 0.0,
    rotary: tuple[Tensor, ...] = (NOTHING, NOTHING),
) -> Plan | None:
    """For what is `Given` (and `GivenKept`) in these layouts; None where the kernel does not serve.

    It serves one token on a CPU, float32 or float64 throughout. Anything else, shapes that do not fit included, is its
    twin's to run or to refuse. rotary: (cos, sin) of at least s + 1 positions [·, 1, k/2], and behind them of `digits`
    where entries are kept.
    """
    writes, attends, window, rule, mixer, retained = schedule
    names = Given._fields + (GivenKept._fields if retained else ())
    if len(names) != len(layouts):
        return None
    got = dict(zip(names, layouts, strict=True))
    (_, q_shape, dtype, _), (_, v_shape, _, _), (_, keys_shape, _, _) = got["q"], got["v"], got["keys"]
    if len(q_shape) != 4 or len(v_shape) != 4 or dtype not in (torch.float32, torch.float64):
        return None
    (b, _, h, k), v = q_shape, v_shape[3]
    has_fw, delayed = writes != "nothing", writes in ("leaving", "chunk")
    linear, gated = (has_fw and rule == name for name in ("linear", "gated-delta"))
    if (
        b == 0
        or (gated and writes == "chunk")
        or (delayed and (window is None or not attends))
        or (mixer != "alone") != (has_fw and attends)
        or (retained and (window is None or not attends))
        or (retained and retained.score.endswith("error") and (writes != "own" or linear))
    ):
        return None
    s = keys_shape[1] if attends and len(keys_shape) == 4 else 0
    K = got["kept_keys"][1][1] if retained and len(got["kept_keys"][1]) == 4 else 0
    nothing = layout_of(NOTHING)

    def of(*shape: int, dtype: torch.dtype = dtype, where: bool = True) -> Layout:
        return (Tensor, shape, dtype, True) if where else nothing

    def weight_of(name: str, size: int, where: bool = True) -> Layout:
        """A parameter, or an ordinary tensor in its place."""
        expected = of(size, where=where)
        return got[name] if got[name] == (Parameter, *expected[1:]) else expected

    expected = {
        "q": of(b, 1, h, k),
        "k": of(b, 1, h, k),
        "v": of(b, 1, h, v),
        "beta": of(b, 1, h, where=has_fw and not linear),
        "decay": of(b, 1, h, where=gated),
        "A_log": weight_of("A_log", h, where=gated),
        "dt_bias": weight_of("dt_bias", h, where=gated),
        "gate": {"vector": of(b, 1, h * v), "scalar": of(b, 1, 2 * h)}.get(mixer, nothing),
        "norm": nothing if got["norm"] == nothing else weight_of("norm", v),
        "resets": nothing if got["resets"] == nothing else of(b, 1, dtype=torch.bool),
        "keys": of(b, s, h, k, where=attends),
        "values": of(b, s, h, v, where=attends),
        "betas": of(b, s, h, where=writes == "chunk" and not linear),
        "matrix": of(b, h, k, v, where=has_fw),
        "key_sum": of(b, h, k, where=linear),
        "position": of(b, dtype=torch.int64),
    }
    if retained:
        kept = of(b, K, h, k), of(b, K, h, v), of(b, K, h, dtype=torch.int64), of(b, K + s, h)
        expected |= zip(GivenKept._fields, kept, strict=True)
    slots = 0 if not attends else s if window is None else window if delayed else window - 1
    rows = len(rotary[0])
    tables = [of(n, 1, k // 2, where=rows > 0) for n in (rows, DIGITS * LEVELS) for _ in range(2)]
    turns = [*map(layout_of, rotary)] == tables[: 4 if retained else 2] and (rows > s or rows == 0)
    if not (got == expected and s == slots and (K > 0) == bool(retained) and turns and native.available()):
        return None
    grows = attends and window is None
    numbers = WRITES.index(writes), attends, RULES.index(rule), MIXERS.index(mixer), K, *_numbers_of(retained)
    head = SIZES_AND_FACTORS.pack(b, h, k, v, s, s + grows, window or EVERYTHING, *numbers, beta_max, norm_eps)
    return Plan(head, dtype is torch.float64, grows, rotary, MORE_ADDRESSES if retained else ADDRESSES)


def _numbers_of(retained: Retained | None) -> tuple[int, int, int, int]:
    if retained is None:
        return 0, 0, 0, 0
    score, sinks, alike, positions = retained
    return sinks, alike, RETENTIONS.index(score), POSITIONS.index(positions)


def digits() -> Tensor:
    """The distances whose rotations the kernel multiplies: digit · 64^level."""
    places = [float(digit * DIGITS**level) for level in range(LEVELS) for digit in range(DIGITS)]
    return torch.tensor(places, dtype=torch.float64, device="cpu")


def may_run(given: tuple[Tensor, ...]) -> bool:
    """Whether nobody forces an implementation by name, checks numbers, traces or asks for gradients."""
    if native.is_traced() or backend.forced() is not None or shapes.checks_finite():
        return False
    return not (torch.is_grad_enabled() and any(x.requires_grad for x in given))


def run(plan: Plan, given: tuple[Tensor, ...]) -> tuple[Values, list[Tensor]]:
    """→ out [b, 1, h, v], and what is held then, from keys on, in tensors of their own."""
    if not all(map(Tensor.is_contiguous, given)):
        given = tuple(map(Tensor.contiguous, given))
    held = given[FIRST_HELD:]
    out, after = torch.empty_like(given[VALUES]), [torch.empty_like(x) if x.numel() else x for x in held]
    if plan.grows:
        after[:2] = [x.new_empty(len(x), x.shape[1] + 1, *x.shape[2:]) for x in held[:2]]
    addresses = map(Tensor.data_ptr, (*given, *plan.tables, out, *after))
    native.one_token(plan.is_double, plan.head + plan.addresses.pack(*addresses))
    return out, after
