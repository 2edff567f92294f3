"""One token through everything between a layer's projections, in C++ (`hqlt/native/step.h`).

    v ← SiLU(v), in one memory or both      β = beta_max · σ(beta), for the delta rules
    log α = −exp(A_log) · softplus(decay + dt_bias), for the gated delta rule
    out = RMSNorm(mix(FW read of q, KV read of q)), or for the mixer "add", γ RMSNorm(FW read) + (1 − δ) KV read

It also selects the entries that stay visible beyond the window, if there are any.

The readable counterpart is the layer's own parts, called one by one: blend, mixer and RMSNorm. The step computes so
little that checking shapes would take as long. So `plan` checks once, and `run` serves all calls with the same layouts.
"""

from __future__ import annotations

import operator
import struct
import threading
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils.weak import WeakTensorKeyDictionary

from hqlt import native, shapes
from hqlt.ops import backend
from hqlt.shapes import Keys, KeySum, Matrix, Queries, Resets, Strengths, Values

WRITES = ("nothing", "own", "leaving", "chunk")
RULES = ("delta", "linear", "gated-delta")
ACTIVATED = ("none", "all", "written")
MIXERS = ("alone", "sum", "scalar", "vector", "add", "add-and-gate")
RETENTIONS = ("recent", "error", "beta-error", "value-norm", "random")
POSITIONS = ("true", "clamped", "none")
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
DIGITS, LEVELS = 64, 11
"""Base and number of digits of a distance (63 bits). The kernel multiplies the rotations of the digits."""
EVERYTHING = 2**62
NOTHING = torch.empty(0, device="cpu")  # placeholder for an absent tensor; its address is 0

# The layout of OneTokenJob in native/memories.cpp.
SIZES_AND_FACTORS, ADDRESSES, MORE_ADDRESSES = struct.Struct("18q2d"), struct.Struct("2q27P"), struct.Struct("2q37P")

Layout: TypeAlias = tuple[type, tuple[int, ...], torch.dtype, bool]
layout_of = operator.attrgetter("__class__", "shape", "dtype", "is_cpu")


class TokenInputs(NamedTuple):
    """Inputs of the kernel: the token's projections and the layer's state. Absent tensors are `NOTHING`."""

    q: Queries  # [b, 1, g·h, k]; q, k, v, beta, decay and gate are as projected
    k: Keys  # [b, 1, h, k]
    v: Values  # [b, 1, h, v]
    beta: Strengths  # [b, 1, h], for the delta rules
    decay: Strengths  # [b, 1, h], for the gated delta rule
    A_log: Tensor  # [h], a weight of the gated delta rule
    dt_bias: Tensor  # [h], likewise
    q_map: Tensor  # [g·h, k, k], a learned map of queries before φ
    k_map: Tensor  # [h, k, k], likewise of keys
    gate: Tensor  # [b, 1, g·h·v] for "vector" and "add", + g·h for "add-and-gate"; 2·g·h for "scalar", FW heads first
    norm: Tensor  # [v], the weight of an RMSNorm over each head
    resets: Resets  # Bool[b, 1]
    keys: Tensor  # [b, s, h, k], before φ and before the rotary embedding; the latest in slot s−1
    values: Tensor  # [b, s, h, v]
    betas: Tensor  # [b, s, h], if a delta rule writes a whole chunk at once
    matrix: Matrix  # [b, h, k, v]
    key_sum: KeySum  # [b, h, k], for linear attention
    position: Tensor  # [b]


class KeptInputs(NamedTuple):
    """Further inputs, after `TokenInputs`, if entries stay visible beyond the window; s counts the recent entries."""

    kept_keys: Tensor  # [b, K, h, k]
    kept_values: Tensor  # [b, K, h, v]
    kept_positions: Tensor  # int64 [b, K, h]
    kept_scores: Tensor  # [b, K + s, h]


VALUES, RESETS, FIRST_HELD = map(TokenInputs._fields.index, ("v", "resets", "keys"))


class Retained(NamedTuple):
    """Which entries stay visible beyond the window, and how they are read."""

    score: str
    """How an entry is scored: one of `RETENTIONS`."""
    sinks: int
    """Number of first entries of a segment that always stay."""
    kept_alike: bool
    """Whether all heads keep the same entries, selected by the mean of their scores."""
    positions: str
    """The distance used when an entry is read: one of `POSITIONS`."""


class Schedule(NamedTuple):
    """The layer's blend, write rule, mixer and retention, as the kernel distinguishes them."""

    writes: str
    """What the FW-memory writes before it is read: the token's "own" entry, the entry "leaving" the window, or a whole
    "chunk" when the next one begins; "nothing" if there is no FW-memory."""
    attends: bool
    """Whether there is a KV-memory."""
    window: int | None
    """Number of entries in the window, the token's own included; None for all."""
    rule: str
    """Write rule of the FW-memory, which also determines φ: "delta", "linear" or "gated-delta" (which does not support
    writing a whole chunk)."""
    mixer: str
    """How the two reads are combined, one of `MIXERS`; "alone" if there is only one memory."""
    activated: str
    """Where values are SiLU(v) instead of v: in both memories ("all"), in the FW-memory ("written") or in neither
    ("none")."""
    retained: Retained | None = None
    """Entries that stay visible beyond the window; None for none."""


class Plan(NamedTuple):
    """A checked call of the kernel."""

    head: bytes
    """Sizes and factors, packed."""
    dtype: int
    """Index in `DTYPES`."""
    grows: bool
    """Whether the entries grow with every token, because the window is unlimited."""
    slots: int
    """Number of held entries."""
    out: tuple[int, ...]
    """Shape of the output."""
    tables: tuple[Tensor, ...]
    """Rotary tables."""
    addresses: struct.Struct
    """Format of the numbers of slots between two rows of entries, before and after, and of the tensors' addresses."""


class EntryBuffer:
    """Memory for these KV entries and those to come, so that those already held are not copied for each new token.

    Keys and values of a state are views of the first slots. A new entry goes to the slot after them, which no view
    shows, unless another continuation of the same state was there first.
    """

    SPARE = 256
    """Slots to add when there is no room left. Attention reads all entries for every token anyway, so that a copy every
    256 tokens costs little."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.slots = keys.shape[1] + self.SPARE
        self.keys, self.values = (x.new_empty(len(x), self.slots, *x.shape[2:]) for x in (keys, values))
        self.used = keys.shape[1] + 1
        self.lock = threading.Lock()

    def take(self, slot: int) -> bool:
        """Take this slot, if it is the next one."""
        with self.lock:
            taken = slot == self.used < self.slots
            self.used += taken
        return taken

    def entries(self, count: int) -> list[Tensor]:
        """Views of the first `count` keys and values."""
        views = [self.keys[:, :count], self.values[:, :count]]
        for view in views:
            BUFFERS[view] = self
        return views

    @staticmethod
    def of(keys: Tensor, values: Tensor) -> EntryBuffer | None:
        """The buffer that these keys and values are views of; None if they are not of one, as after `_replace`."""
        buffer: EntryBuffer | None = BUFFERS.get(keys)
        if buffer is None or BUFFERS.get(values) is not buffer:
            return None
        mine = buffer.keys.data_ptr(), buffer.values.data_ptr()
        return buffer if (keys.data_ptr(), values.data_ptr()) == mine else None


BUFFERS = WeakTensorKeyDictionary()
"""The buffer of keys and values that are views of one."""


def plan(
    schedule: Schedule,
    layouts: tuple[Layout, ...],
    *,
    beta_max: float = 1.0,
    norm_eps: float = 0.0,
    rotary: tuple[Tensor, ...] = (NOTHING, NOTHING),
) -> Plan | None:
    """Plan calls for inputs of these layouts; None if the kernel does not support them.

    The kernel supports one token on a CPU in one of `DTYPES`. With bfloat16, states of the FW-memory, scores and tables
    are in float32, as is all computation. Everything else, wrong shapes included, is left to the layer's parts to run
    or to reject.

    Args:
        schedule: What the layer computes.
        layouts: `layout_of` each of the `TokenInputs` and, if entries are kept, of the `KeptInputs`.
        beta_max: Upper bound of β.
        norm_eps: Added to the mean square in RMSNorm.
        rotary: cos and sin of at least s + 1 positions, [·, 1, k/2] each; if entries are kept, also those of `digits`.
    """
    writes, attends, window, rule, mixer, activated, retained = schedule
    names = TokenInputs._fields + (KeptInputs._fields if retained else ())
    if len(names) != len(layouts):
        return None
    got = dict(zip(names, layouts, strict=True))
    (_, q_shape, dtype, _), (_, v_shape, _, _), (_, keys_shape, _, _) = got["q"], got["v"], got["keys"]
    if len(q_shape) != 4 or len(v_shape) != 4 or dtype not in DTYPES:
        return None
    (b, _, readers, k), (_, _, h, v) = q_shape, v_shape
    has_fw, delayed = writes != "nothing", writes in ("leaving", "chunk")
    linear, gated = (has_fw and rule == name for name in ("linear", "gated-delta"))
    if (
        b == 0
        or h == 0
        or readers % h
        or (gated and writes == "chunk")
        or (delayed and (window is None or not attends))
        or (mixer != "alone") != (has_fw and attends)
        or (retained and (window is None or not attends))
        or (retained and retained.score.endswith("error") and (writes != "own" or linear))
    ):
        return None
    s = keys_shape[1] if attends and len(keys_shape) == 4 else 0
    K = got["kept_keys"][1][1] if retained and len(got["kept_keys"][1]) == 4 else 0
    nothing, wide = layout_of(NOTHING), shapes.at_least_float32(dtype)
    mapped = has_fw and got["q_map"] != nothing
    per_channel = readers * v
    gates = {"vector": per_channel, "add": per_channel, "add-and-gate": per_channel + readers, "scalar": 2 * readers}

    def layout(*shape: int, dtype: torch.dtype = dtype, present: bool = True) -> Layout:
        return (Tensor, shape, dtype, True) if present else nothing

    def weight(name: str, *shape: int, present: bool = True) -> Layout:
        """The layout of a weight, which may be a parameter or an ordinary tensor."""
        expected = layout(*shape, present=present)
        return got[name] if got[name] == (Parameter, *expected[1:]) else expected

    expected = {
        "q": layout(b, 1, readers, k),
        "k": layout(b, 1, h, k),
        "v": layout(b, 1, h, v),
        "beta": layout(b, 1, h, present=has_fw and not linear),
        "decay": layout(b, 1, h, present=gated),
        "A_log": weight("A_log", h, present=gated),
        "dt_bias": weight("dt_bias", h, present=gated),
        "q_map": weight("q_map", readers, k, k, present=mapped),
        "k_map": weight("k_map", h, k, k, present=mapped),
        "gate": layout(b, 1, gates.get(mixer, 0), present=mixer in gates),
        "norm": nothing if got["norm"] == nothing else weight("norm", v),
        "resets": nothing if got["resets"] == nothing else layout(b, 1, dtype=torch.bool),
        "keys": layout(b, s, h, k, present=attends),
        "values": layout(b, s, h, v, present=attends),
        "betas": layout(b, s, h, dtype=wide, present=writes == "chunk" and not linear),
        "matrix": layout(b, h, k, v, dtype=wide, present=has_fw),
        "key_sum": layout(b, h, k, dtype=wide, present=linear),
        "position": layout(b, dtype=torch.int64),
    }
    if retained:
        kept = (
            layout(b, K, h, k),
            layout(b, K, h, v),
            layout(b, K, h, dtype=torch.int64),
            layout(b, K + s, h, dtype=wide),
        )
        expected |= zip(KeptInputs._fields, kept, strict=True)
    slots = 0 if not attends else s if window is None else window if delayed else window - 1
    rows = len(rotary[0])
    tables = [layout(n, 1, k // 2, dtype=wide, present=rows > 0) for n in (rows, DIGITS * LEVELS) for _ in range(2)]
    rotary_fits = [*map(layout_of, rotary)] == tables[: 4 if retained else 2] and (rows > s or rows == 0)
    if not (got == expected and s == slots and (K > 0) == bool(retained) and rotary_fits and native.available()):
        return None
    grows = attends and window is None
    which = WRITES.index(writes), attends, ACTIVATED.index(activated), RULES.index(rule), MIXERS.index(mixer)
    sizes = b, h, readers // h, k, v, s, s + grows, window or EVERYTHING
    head = SIZES_AND_FACTORS.pack(*sizes, *which, K, *_numbers_of(retained), beta_max, norm_eps)
    return Plan(
        head, DTYPES.index(dtype), grows, s, (b, 1, readers, v), rotary, MORE_ADDRESSES if retained else ADDRESSES
    )


def _numbers_of(retained: Retained | None) -> tuple[int, int, int, int]:
    if retained is None:
        return 0, 0, 0, 0
    score, sinks, kept_alike, positions = retained
    return sinks, kept_alike, RETENTIONS.index(score), POSITIONS.index(positions)


def digits() -> Tensor:
    """The distances whose rotations the kernel multiplies: digit · 64^level."""
    places = [float(digit * DIGITS**level) for level in range(LEVELS) for digit in range(DIGITS)]
    return torch.tensor(places, dtype=torch.float64, device="cpu")


def may_run(inputs: tuple[Tensor, ...]) -> bool:
    """Whether the kernel may run: no backend is forced, no finite check or tracer is active, no gradient is needed."""
    if native.is_traced() or backend.forced() is not None or shapes.checks_finite():
        return False
    return not (torch.is_grad_enabled() and any(x.requires_grad for x in inputs))


def run(plan: Plan, inputs: tuple[Tensor, ...]) -> tuple[Values, list[Tensor]]:
    """Returns the output [b, 1, g·h, v] and the new state from `keys` on: new tensors, or views of an `EntryBuffer`."""
    rows = rows_after = plan.slots
    if plan.grows:
        inputs, rows, entries, rows_after = _grown(plan, inputs)
    elif not all(map(Tensor.is_contiguous, inputs)):
        inputs = tuple(map(Tensor.contiguous, inputs))
    after = [torch.empty_like(x) if x.numel() else x for x in inputs[FIRST_HELD + 2 * plan.grows :]]
    if plan.grows:
        after = entries + after
    out = inputs[VALUES].new_empty(plan.out)
    addresses = map(Tensor.data_ptr, (*inputs, *plan.tables, out, *after))
    native.one_token(plan.dtype, plan.head + plan.addresses.pack(rows, rows_after, *addresses))
    return out, after


def _grown(plan: Plan, inputs: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], int, list[Tensor], int]:
    """Returns the inputs in contiguous memory, except for entries in an `EntryBuffer`; the number of slots between the
    rows of entries; keys and values with one more slot; and the number of slots between the rows of these."""
    keys, values = inputs[FIRST_HELD : FIRST_HELD + 2]
    buffer = EntryBuffer.of(keys, values)
    if buffer is None:
        inputs = tuple(map(Tensor.contiguous, inputs))
    else:
        own, others = inputs[:FIRST_HELD], inputs[FIRST_HELD + 2 :]
        inputs = *map(Tensor.contiguous, own), keys, values, *map(Tensor.contiguous, others)
    rows = plan.slots if buffer is None else buffer.slots
    if buffer is None or inputs[RESETS] is not NOTHING or not buffer.take(plan.slots):
        buffer = EntryBuffer(keys, values)
    return inputs, rows, buffer.entries(plan.slots + 1), buffer.slots
