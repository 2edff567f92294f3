"""Which implementation runs, and why.

Every operation has a readable `reference` and faster twins of the same signature. The first of its rules that holds for
a call names the one that runs. A caller may name one (`backend="chunked"`), or force one for a while:

    with hqlt.ops.use_backend("reference"):
        y, state = layer(x)
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack

from hqlt import native
from hqlt.context import Setting
from hqlt.ops import fla
from hqlt.registry import load_plugins, one_of
from hqlt.shapes import is_symbolic

F = TypeVar("F", bound=Callable[..., Any])


class Choice(NamedTuple):
    name: str
    why: str


class Rule(NamedTuple):
    choice: Choice
    holds: Callable[..., bool | str]
    """Of a call's first argument, and of the options that decide (a window). A text: no, and why not."""


def _rule(name: str, holds: Callable[..., bool | str], why: str) -> Rule:
    return Rule(Choice(name, why), holds)


def _always(x: Tensor, **options: Any) -> bool:
    return True


def _natively(x: Tensor) -> bool:
    return x.device.type == "cpu" and native.available()


def _dense_or_native(q: Tensor, window: int | None) -> bool:
    """Whether a native pass over the window is no more work than one call of torch's over all pairs."""
    return is_symbolic(q.shape[1]) or q.shape[1] <= 1024 or _mostly_masked(q, window)


def _mostly_masked(q: Tensor, window: int | None) -> bool:
    return window is not None and 2 * window <= q.shape[1]


_tried: dict[tuple[fla.Kind, int | None], str] = {}
"""Why flash-linear-attention does not serve calls of a kind on a GPU; "" where it answered as the reference does."""


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _why_not_fla(device: int | None, *call: Any) -> str:
    """call: a `fla.Kind`'s, one by one: torch's compiler knows no constant NamedTuple."""
    kind = fla.Kind(*call)
    if (kind, device) not in _tried:
        if _len_torch_dispatch_stack() or native.is_transformed():
            return "not tried yet on this GPU: a mode of torch watches"
        known = IMPLEMENTATIONS[kind.op]
        _tried[kind, device] = fla.why_wrong(kind, known["fla"], known["reference"], device)
    return _tried[kind, device]


def _by_fla(q: Tensor, kind: fla.Kind | None = None) -> bool | str:
    """Whether its kernel runs on this GPU and answers as the reference does: tried once a process and kind of call."""
    if kind is None or q.shape[1] < fla.CHUNK or not fla.on_gpu(q):
        return False
    return _why_not_fla(q.device.index, *kind) or True


ON_CPU = "on a CPU: one pass in C++, the memory stays in the cache"
MATRIX = (
    _rule("native", lambda q, **options: _natively(q), ON_CPU),
    _rule(
        "reference",
        lambda q, **options: q.shape[1] <= 1,
        "one token or none: the equation itself takes the fewest calls",
    ),
    _rule("fla", _by_fla, "many tokens: flash-linear-attention's kernel, which answered as the reference on this GPU"),
    _rule("chunked", _always, "many tokens: matrix products over chunks"),
)
ROWS = (
    _rule(
        "native",
        lambda x: _natively(x) and x.dtype in (torch.float32, torch.float64),
        "on a CPU: all factors in one pass over the numbers",
    ),
    _rule("reference", _always, "a factor a call"),
)
PAIRS = (
    _rule("native", lambda q, window=None: _dense_or_native(q, window) and _natively(q), ON_CPU),
    _rule("dense", lambda q, window=None: is_symbolic(q.shape[1]), "exported for any length: one fused call"),
    _rule("dense", lambda q, window=None: q.shape[1] <= 128, "a short sequence: one fused call"),
    _rule(
        "dense",
        lambda q, window=None: not _mostly_masked(q, window),
        "a window of over half the sequence: hardly less work",
    ),
    _rule("blocked", _always, "many windows in the sequence: work linear in length"),
)
ENTRIES = (
    _rule("native", _natively, "on a CPU: one pass in C++ with a heap of the kept entries"),
    _rule("chunked", _always, "kept entries and a chunk of new ones at a time"),
)
RULES: dict[str, tuple[Rule, ...]] = {
    "delta_rule": MATRIX,
    "fast_weights": MATRIX,
    "linear_attention": tuple(rule for rule in MATRIX if rule.choice.name != "fla"),
    "window_attention": PAIRS,
    "expiry": ENTRIES,
    "synchronous": (_rule("composed", _always, "the fastest operation for each memory; triton is not measured yet"),),
    "unit_silu": ROWS,
    "rotated": ROWS,
    "rms_norm": ROWS,
    "mix": ROWS,
}

IMPLEMENTATIONS: dict[str, dict[str, Callable[..., Any]]] = {op: {} for op in RULES}
"""By operation and name, as they were registered."""

_forced: Setting[str | None] = Setting("hqlt.ops.use_backend", None)


def register_backend(op: str, name: str) -> Callable[[F], F]:
    """A decorator: from now on this name means the function, as an implementation of the operation.

        @hqlt.ops.register_backend("rms_norm", "mine")
        def rms_norm(x, weight, eps): ...

    It takes what the operation's `reference` takes, and returns what that returns. No rule picks it: it runs where
    `backend=` or `use_backend` names it.

    Raises ValueError for an unknown operation, and for a name that another implementation of it has.
    """
    one_of("op", op, IMPLEMENTATIONS)

    def enter(function: F) -> F:
        holder = IMPLEMENTATIONS[op].setdefault(name, function)
        if (holder.__module__, holder.__qualname__) != (function.__module__, function.__qualname__):
            raise ValueError(
                f"name: expected one that no implementation of {op} has, got {name!r}, which is {holder.__module__}."
                f"{holder.__qualname__}; choose another"
            )
        IMPLEMENTATIONS[op][name] = function  # the same one, defined anew where a module is imported again
        return function

    return enter


def use_backend(name: str | None) -> AbstractContextManager[None]:
    """Force the implementation of this name in every operation that has it, until the context ends.

    It holds for the current thread (and asyncio task); a thread that is started within it begins with the default.

    Raises ValueError for a name that no operation has.
    """
    if name is not None and not any(name in names for names in IMPLEMENTATIONS.values()):
        load_plugins()
        one_of("backend", name, sorted({name for names in IMPLEMENTATIONS.values() for name in names}))
    return _forced.set(name)


def forced() -> str | None:
    """The implementation that `use_backend` forces here; None: the operation picks."""
    return _forced.get()


OWN_OPERATIONS = ("reference", "composed")
"""Made of torch's own operations alone, or of operations that choose for themselves: any transform serves them."""
TRACEABLE = (*OWN_OPERATIONS, "native")
"""What torch.jit.trace records as it is."""


def explain(op: str, x: Tensor, *, backend: str | None = None, **options: Any) -> Choice:
    """Which implementation of `op` would run on x, its first argument, and why.

    >>> hqlt.ops.explain("window_attention", q, window=64)
    Choice(name='blocked', why='many windows in the sequence: work linear in length')

    x: queries [b, t, g·h, k]; of `rms_norm` and `mix` the weight, in whose dtype they compute. options: the window, of
    `window_attention`; of `fast_weights` and `delta_rule` the kind of call (`hqlt.ops.fla.Kind`), without which
    flash-linear-attention is not considered.

    Raises ValueError for an unknown operation or backend, RuntimeError for a backend that cannot serve what watches.
    """
    if op not in RULES:
        one_of("op", op, RULES)
    known, name = IMPLEMENTATIONS[op], backend
    if name is None and (name := forced()) not in known:
        name = None
    if name is None:
        choice = _chosen(op, x, **options)
    else:
        if name not in known:
            load_plugins()
            one_of(f"{op}: backend", name, known)
        choice = Choice(name, "forced by hqlt.ops.use_backend" if backend is None else "named by the caller")
    watcher = _not_served(choice.name)
    if watcher and name is not None:
        raise RuntimeError(
            f"{op}: backend {name!r} does not run under {watcher}; call it within "
            f'hqlt.ops.use_backend("reference"), or name no backend'
        )
    return Choice("reference", f"{watcher} needs torch's own operations") if watcher else choice


def _chosen(op: str, x: Tensor, **options: Any) -> Choice:
    """Of the first rule that holds, with what those before it say."""
    said = ""
    for (name, why), holds in RULES[op]:
        if (answer := holds(x, **options)) is True:
            return Choice(name, why + said)
        said += f"; not {name}: {answer}" if answer else ""
    raise AssertionError(f"no rule holds for {op}")


def _not_served(name: str) -> str:
    """What watches the call that this implementation cannot serve; "" where it serves."""
    if name not in OWN_OPERATIONS and native.is_transformed():
        return "forward-mode AD or a transform of torch.func"
    if name not in TRACEABLE and native.is_jit_traced():
        return "torch.jit.trace"
    return ""


def implementation(op: str, x: Tensor, backend: str | None, size: dict[str, int], **options: Any) -> Callable[..., Any]:
    """The one that runs. Where a size is 0 the reference: there is nothing to be fast at, and torch's own operations
    know what nothing is."""
    name = explain(op, x, backend=backend, **options).name
    return IMPLEMENTATIONS[op]["reference" if 0 in size.values() else name]


def empty_read(v: Tensor, heads: int, *inputs: Tensor) -> Tensor:
    """What no queries read, [b, 0, heads, v]: a function of v and all other inputs, whose gradients are zeros."""
    empty = v.new_zeros(v.shape[0], 0, heads, v.shape[3])
    return sum((x.narrow(0, 0, 0).sum() for x in (v, *inputs)), start=empty)
