"""Selection of the implementation (backend) that runs, and the reason for it.

Every operation has a readable `reference` implementation and faster ones with the same signature. `RULES` lists the
conditions for each; the first that holds for a call selects the backend. A caller can name one instead
(`backend="chunked"`), or force one within a context:

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
from hqlt.registry import check_choice, load_plugins
from hqlt.shapes import is_symbolic

F = TypeVar("F", bound=Callable[..., Any])


class Choice(NamedTuple):
    """The backend that runs, and the reason it was selected."""

    name: str
    """Name of the backend."""
    why: str
    """The reason, as a phrase for people to read."""


class Rule(NamedTuple):
    """A backend and the condition under which it is selected."""

    choice: Choice
    holds: Callable[..., bool | str]
    """Takes the call's first argument and the options that matter, such as the window. Returns True, False, or a string
    that says why the backend was rejected."""


def _rule(name: str, holds: Callable[..., bool | str], why: str) -> Rule:
    return Rule(Choice(name, why), holds)


def _always(x: Tensor, **options: Any) -> bool:
    return True


def _can_run_native(x: Tensor) -> bool:
    return x.device.type == "cpu" and native.available()


def _native_attention_pays(q: Tensor, window: int | None) -> bool:
    """Whether a native pass over the window is no more work than one PyTorch call over all KV entries."""
    return is_symbolic(q.shape[1]) or q.shape[1] <= 1024 or _mostly_masked(q, window)


def _mostly_masked(q: Tensor, window: int | None) -> bool:
    return window is not None and 2 * window <= q.shape[1]


_tried: dict[tuple[fla.Kind, int | None], str] = {}
"""Why flash-linear-attention was rejected, by kind of call and GPU; "" if its results matched the reference."""


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _why_not_fla(device: int | None, *call: Any) -> str:
    """Why flash-linear-attention must not be used, or "".

    call: the fields of a `fla.Kind`, passed separately because torch.compile does not support a constant NamedTuple.
    """
    kind = fla.Kind(*call)
    if (kind, device) not in _tried:
        if _len_torch_dispatch_stack() or native.is_transformed():
            return "not tried yet on this GPU: a torch dispatch mode or transform is active"
        known = IMPLEMENTATIONS[kind.op]
        _tried[kind, device] = fla.find_mismatch(kind, known["fla"], known["reference"], device)
    return _tried[kind, device]


def _can_run_fla(q: Tensor, kind: fla.Kind | None = None) -> bool | str:
    """Whether the fla kernel runs on this GPU and matches the reference; checked once per process and kind of call."""
    if kind is None or q.shape[1] < fla.CHUNK or not fla.on_gpu(q):
        return False
    return _why_not_fla(q.device.index, *kind) or True


ON_CPU = "on a CPU: one pass in C++, the memory stays in the cache"
FAST_WEIGHTS = (
    _rule("native", lambda q, **options: _can_run_native(q), ON_CPU),
    _rule(
        "reference",
        lambda q, **options: q.shape[1] <= 1,
        "at most one token: the reference takes the fewest calls",
    ),
    _rule("fla", _can_run_fla, "many tokens: flash-linear-attention's kernel, which matched the reference on this GPU"),
    _rule("chunked", _always, "many tokens: matrix products over chunks"),
)
ELEMENTWISE = (
    _rule(
        "native",
        lambda x: _can_run_native(x) and x.dtype in (torch.float32, torch.float64),
        "on a CPU: all steps fused into one pass",
    ),
    _rule("reference", _always, "one PyTorch call per step"),
)
ATTENTION = (
    _rule("native", lambda q, window=None: _native_attention_pays(q, window) and _can_run_native(q), ON_CPU),
    _rule("dense", lambda q, window=None: is_symbolic(q.shape[1]), "exported for any length: one fused call"),
    _rule("dense", lambda q, window=None: q.shape[1] <= 128, "a short sequence: one fused call"),
    _rule(
        "dense",
        lambda q, window=None: not _mostly_masked(q, window),
        "the window is over half the sequence: blocks would save little work",
    ),
    _rule("blocked", _always, "many windows in the sequence: work linear in length"),
)
EXPIRY = (
    _rule("native", _can_run_native, "on a CPU: one pass in C++ with a heap of the kept entries"),
    _rule("chunked", _always, "the kept entries and one chunk of new entries at a time"),
)
RULES: dict[str, tuple[Rule, ...]] = {
    "delta_rule": FAST_WEIGHTS,
    "fast_weights": FAST_WEIGHTS,
    "linear_attention": tuple(rule for rule in FAST_WEIGHTS if rule.choice.name != "fla"),
    "window_attention": ATTENTION,
    "expiry": EXPIRY,
    "synchronous": (_rule("composed", _always, "the fastest operation for each memory; triton is not measured yet"),),
    "unit_silu": ELEMENTWISE,
    "rotated": ELEMENTWISE,
    "rms_norm": ELEMENTWISE,
    "mix": ELEMENTWISE,
}

IMPLEMENTATIONS: dict[str, dict[str, Callable[..., Any]]] = {op: {} for op in RULES}
"""All registered implementations, by operation and name."""

_forced: Setting[str | None] = Setting("hqlt.ops.use_backend", None)


def register_backend(op: str, name: str) -> Callable[[F], F]:
    """Decorator that registers a function as a backend of an operation.

    The function must accept the same arguments as the operation's `reference` and return the same values. It is never
    selected automatically; it runs only if `backend=` or `use_backend` names it.

    Args:
        op: Name of the operation, such as `"delta_rule"`.
        name: Name of the new backend.

    Returns:
        The decorator, which returns the function unchanged.

    Raises:
        ValueError: If the operation is unknown, or another implementation of it already has this name.

    Example:
        >>> import torch, hqlt
        >>> @hqlt.ops.register_backend("rms_norm", "mine")
        ... def rms_norm(x, weight, eps):
        ...     return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        >>> hqlt.ops.rms_norm(torch.ones(3), torch.ones(3), eps=0.0, backend="mine")
        tensor([1., 1., 1.])
    """
    check_choice("op", op, IMPLEMENTATIONS)

    def register(function: F) -> F:
        registered = IMPLEMENTATIONS[op].setdefault(name, function)
        if (registered.__module__, registered.__qualname__) != (function.__module__, function.__qualname__):
            raise ValueError(
                f"name: expected one that is not yet a backend of {op}, got {name!r}, which is "
                f"{registered.__module__}.{registered.__qualname__}; choose another name"
            )
        IMPLEMENTATIONS[op][name] = function  # replaces the same function if its module was imported again
        return function

    return register


def use_backend(name: str | None) -> AbstractContextManager[None]:
    """Context manager that forces a backend in every operation that has one of this name.

    It applies to the current thread (and asyncio task) only; a thread started within the context uses the default.

    Args:
        name: Name of the backend; None restores the automatic selection.

    Returns:
        The context manager.

    Raises:
        ValueError: If no operation has a backend of this name.

    Example:
        >>> import torch, hqlt
        >>> layer, x = hqlt.HybridMemory(hidden_size=8, num_heads=2, window=4), torch.randn(1, 3, 8)
        >>> with hqlt.ops.use_backend("reference"):
        ...     y, state = layer(x)
    """
    if name is not None and not any(name in names for names in IMPLEMENTATIONS.values()):
        load_plugins()
        check_choice("backend", name, sorted({name for names in IMPLEMENTATIONS.values() for name in names}))
    return _forced.set(name)


def forced() -> str | None:
    """The backend forced by `use_backend`, or None if the selection is automatic."""
    return _forced.get()


TRANSFORMABLE = ("reference", "composed")
"""Backends made of PyTorch's own operations, or of operations that select a backend themselves: every transform
supports them."""
TRACEABLE = (*TRANSFORMABLE, "native")
"""Backends that torch.jit.trace can record."""


def explain(op: str, x: Tensor, *, backend: str | None = None, **options: Any) -> Choice:
    """Which backend of an operation would run on `x`, and why.

    Args:
        op: Name of the operation.
        x: The operation's first argument, such as queries `[b, t, g·h, k]`. For `rms_norm` and `mix`, the weight, whose
            dtype is the one they compute in.
        backend: Name of a backend, as passed to the operation.
        options: `window`, for `window_attention`. `kind` (`hqlt.ops.fla.Kind`), for `fast_weights` and `delta_rule`;
            without it, flash-linear-attention is not considered.

    Returns:
        The name of the backend and the reason.

    Raises:
        ValueError: If the operation or the backend is unknown.
        RuntimeError: If the named or forced backend does not support the transform or tracer that is active.

    Example:
        >>> import torch, hqlt
        >>> q = torch.empty(1, 4096, 8, 64, device="meta")
        >>> hqlt.ops.explain("window_attention", q, window=64)
        Choice(name='blocked', why='many windows in the sequence: work linear in length')
    """
    if op not in RULES:
        check_choice("op", op, RULES)
    known, name = IMPLEMENTATIONS[op], backend
    if name is None and (name := forced()) not in known:
        name = None
    if name is None:
        choice = _select(op, x, **options)
    else:
        if name not in known:
            load_plugins()
            check_choice(f"{op}: backend", name, known)
        choice = Choice(name, "forced by hqlt.ops.use_backend" if backend is None else "named by the caller")
    transform = _unsupported_transform(choice.name)
    if transform and name is not None:
        raise RuntimeError(
            f"{op}: backend {name!r} does not run under {transform}; call it within "
            f'hqlt.ops.use_backend("reference"), or name no backend'
        )
    return Choice("reference", f"{transform} needs torch's own operations") if transform else choice


def _select(op: str, x: Tensor, **options: Any) -> Choice:
    """The choice of the first rule that holds; the reasons for rejecting earlier ones are appended."""
    rejections = ""
    for (name, why), holds in RULES[op]:
        if (answer := holds(x, **options)) is True:
            return Choice(name, why + rejections)
        rejections += f"; not {name}: {answer}" if answer else ""
    raise AssertionError(f"no rule holds for {op}")


def _unsupported_transform(name: str) -> str:
    """The active transform or tracer that this backend does not support, or ""."""
    if name not in TRANSFORMABLE and native.is_transformed():
        return "forward-mode AD or a transform of torch.func"
    if name not in TRACEABLE and native.is_jit_traced():
        return "torch.jit.trace"
    return ""


def implementation(op: str, x: Tensor, backend: str | None, size: dict[str, int], **options: Any) -> Callable[..., Any]:
    """The implementation that runs. If any size is 0, this is the reference, which handles empty tensors."""
    name = explain(op, x, backend=backend, **options).name
    return IMPLEMENTATIONS[op]["reference" if 0 in size.values() else name]


def empty_read(v: Tensor, heads: int, *inputs: Tensor) -> Tensor:
    """The output for zero queries, [b, 0, heads, v]. It depends on all inputs, so that their gradients are zeros."""
    empty = v.new_zeros(v.shape[0], 0, heads, v.shape[3])
    return sum((x.narrow(0, 0, 0).sum() for x in (v, *inputs)), start=empty)
