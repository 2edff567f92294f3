"""One token through both memories in C++ (`hqlt/native/step.h`). Its readable twins are the blends of `hqlt.blend`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hqlt import native, shapes
from hqlt.ops import backend
from hqlt.shapes import Keys, KeySum, Matrix, Queries, Resets, Strengths, Values

WRITES = ("own", "leaving", "chunk")
RULES = ("delta", "linear")
DTYPES = (torch.float32, torch.float64)
EVERYTHING = 2**62


class Held(NamedTuple):
    """What a layer holds between two tokens, as in `hqlt.memory.MemoryState`."""

    keys: Tensor  # [b, s, h, k], before φ and before rotary positions; the latest in slot s−1
    values: Tensor  # [b, s, h, v]
    betas: Tensor  # [b, s, h], or [b, s, 0] where they are not kept
    matrix: Matrix  # [b, h, k, v]
    key_sum: KeySum  # [b, h, k], or [b, h, 0] for the delta rule
    position: Tensor  # [b]


class Schedule(NamedTuple):
    """What happens to a token: the blend, as the kernel knows it."""

    writes: str | None
    """What the FW-memory writes before it is read: its "own" pair, the one "leaving" the window, a whole "chunk" when
    the next one begins; None: there is no FW-memory."""
    attends: bool
    """Whether there is a KV-memory."""
    window: int | None
    """Pairs that the KV-memory reaches, the own one included; None: all."""
    rule: str = "delta"
    """The FW-memory's write rule, and with it φ."""


def step(
    q: Queries,
    k: Keys,
    v: Values,
    beta: Strengths,
    held: Held,
    schedule: Schedule,
    *,
    rotary: tuple[Tensor, Tensor] | None = None,
    resets: Resets | None = None,
) -> tuple[Values | None, Values | None, Held] | None:
    """Both memories' reads of one token, and what is held after it. None where this implementation does not serve.

    It serves one token on a CPU, float32 or float64 throughout, without gradients and tracing, where no implementation
    is forced by name. Anything else, shapes that do not fit included, is its twin's to run or to refuse.

    q, k: [b, 1, h, k], v: [b, 1, h, v] as projected. beta: [b, 1, h]. rotary: (cos, sin) of at least s + 1 positions
    [·, 1, k/2]; None for no positions. resets: Bool[b, 1].

    → FW read, KV read ([b, 1, h, v]; None from a memory that is not there), and what is held, in tensors of their own:
    what was given is left as it was.
    """
    if not (
        q.shape[1] == 1
        and backend._forced is None
        and not shapes._finite_checks
        and native.is_plain(q, k, v, beta, *held, resets)
        and _fits(q, k, v, beta, held, schedule, rotary, resets)
        and native.available()
    ):
        return None
    (b, _, h, width), (_, s, _, v_width) = q.shape, held.values.shape
    grows = schedule.attends and schedule.window is None
    q, k, v, beta, resets = native.contiguous(q, k, v, beta, resets)
    keys, values, betas, matrix, key_sum, position = given = native.contiguous(*held)
    keeps_betas = schedule.writes == "chunk"
    if grows:
        keys, values, betas = (x.new_empty(b, s + 1, *x.shape[2:]) for x in given[:3])
    elif s:
        keys, values = torch.empty_like(keys), torch.empty_like(values)
        betas = torch.empty_like(betas) if keeps_betas else betas  # else empty, as the key sum of the delta rule
    position = torch.empty_like(position)
    fw = kv = None
    if schedule.writes is not None:
        fw, matrix = torch.empty_like(v), torch.empty_like(matrix)
        key_sum = torch.empty_like(key_sum) if schedule.rule == "linear" else key_sum
    if schedule.attends:
        kv = torch.empty_like(v)
    cos, sin = (None, None) if rotary is None else native.contiguous(*rotary)
    native.run(
        "one_token_forward",
        (
            b, h, width, v_width, s, s + grows, schedule.window or EVERYTHING, WRITES.index(schedule.writes or "own"),
            RULES.index(schedule.rule),
        ),
        width**-0.5,
        (
            q, k, v, beta, *given, resets, cos, sin,
            fw, kv, keys, values, betas if keeps_betas else None, matrix, key_sum, position,
        ),
    )  # fmt: skip
    return fw, kv, Held(keys, values, betas, matrix, key_sum, position)


def _fits(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    held: Held,
    schedule: Schedule,
    rotary: tuple[Tensor, Tensor] | None,
    resets: Tensor | None,
) -> bool:
    """Whether everything has the type, place and shape that the kernel reads and writes."""
    dtype, (b, _, h, width), value_shape, key_shape = q.dtype, q.shape, v.shape, held.keys.shape
    s, v_width, window, writes = key_shape[1], value_shape[3], schedule.window, schedule.writes
    if dtype not in DTYPES or b == 0 or any(x.dtype is not dtype for x in (k, v, beta, *held[:5], *(rotary or ()))):
        return False
    if not all(x.is_cpu for x in (q, k, v, beta, *held)):
        return False
    if resets is not None and (resets.dtype is not torch.bool or resets.shape != (b, 1) or not resets.is_cpu):
        return False
    delayed = writes in ("leaving", "chunk")
    if delayed and (window is None or not schedule.attends):
        return False
    if not schedule.attends:
        slots = 0
    elif window is None:
        slots = s
    else:
        slots = window if delayed else window - 1
    return (
        s == slots
        and k.shape == q.shape
        and value_shape == (b, 1, h, v_width)
        and beta.shape == (b, 1, h)
        and key_shape == (b, s, h, width)
        and held.values.shape == (b, s, h, v_width)
        and held.betas.shape == (b, s, h if writes == "chunk" else 0)
        and (writes is None or held.matrix.shape == (b, h, width, v_width))
        and (writes is None or held.key_sum.shape == (b, h, width if schedule.rule == "linear" else 0))
        and held.position.shape == (b,)
        and held.position.dtype is torch.int64
        and (rotary is None or (_is_table(rotary[0], s, width) and _is_table(rotary[1], s, width)))
    )


def _is_table(table: Tensor, s: int, width: int) -> bool:
    rows, one, half = table.shape
    return rows > s and one == 1 and 2 * half == width and table.is_cpu
