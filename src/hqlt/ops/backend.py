"""Which implementation runs, and why.

Every operation has a readable `reference` and faster twins of the same signature. The first rule that holds for the
call's first argument names the one that runs. A caller may name one (`backend="chunked"`), or force one for a while:

    with hqlt.ops.use_backend("reference"):
        y, state = layer(x)
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hqlt import native
from hqlt.context import Setting


class Choice(NamedTuple):
    name: str
    why: str


class Rule(NamedTuple):
    name: str
    holds: Callable[[Tensor], bool]
    why: str

    def when(self, condition: bool) -> Rule:
        """This rule where the condition holds, and one that never holds elsewhere."""
        return self if condition else self._replace(holds=lambda x: False)


def _runs_natively(x: Tensor) -> bool:
    return x.device.type == "cpu" and native.available()


NATIVE = Rule("native", _runs_natively, "on a CPU: one pass in C++, the memory stays in the cache")
NATIVE_ROWS = Rule(
    "native",
    lambda x: _runs_natively(x) and x.dtype in (torch.float32, torch.float64),
    "on a CPU: all factors in one pass over the numbers",
)

KNOWN: set[str] = set()
"""The names of all implementations; each operation adds its own."""

_forced: Setting[str | None] = Setting("hqlt.ops.use_backend", None)


def register(implementations: Mapping[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """An operation's implementations by name, of which one is the reference."""
    assert "reference" in implementations
    KNOWN.update(implementations)
    return dict(implementations)


def use_backend(name: str | None) -> AbstractContextManager[None]:
    """Force the implementation of this name in every operation that has it, until the context ends.

    It holds for the current thread (and asyncio task); a thread that is started within it begins with the default.

    Raises ValueError for a name that no operation has.
    """
    if name is not None and name not in KNOWN:
        near = difflib.get_close_matches(str(name), KNOWN, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"backend: expected one of {', '.join(sorted(KNOWN))} or None, got {name!r}{hint}")
    return _forced.set(name)


def forced() -> str | None:
    """The implementation that `use_backend` forces here; None: the operation picks."""
    return _forced.get()


OWN_OPERATIONS = ("reference", "composed")
"""Made of torch's own operations alone, or of operations that choose for themselves: any transform serves them."""
TRACEABLE = (*OWN_OPERATIONS, "native")
"""What torch.jit.trace records as it is."""


def choose(
    op: str, implementations: Mapping[str, Any], rules: tuple[Rule, ...], subject: Tensor, named: str | None
) -> Choice:
    if named is not None and named not in implementations:
        raise ValueError(f"{op}: expected a backend among {', '.join(implementations)}, got {named!r}")
    if named is not None:
        choice = Choice(named, "named by the caller")
    elif (name := forced()) is not None and name in implementations:
        named, choice = name, Choice(name, "forced by hqlt.ops.use_backend")
    else:
        choice = next(Choice(rule.name, rule.why) for rule in rules if rule.holds(subject))
    watcher = _not_served(choice.name)
    if watcher and named is not None:
        raise RuntimeError(
            f"{op}: backend {named!r} does not run under {watcher}; call it within "
            f'hqlt.ops.use_backend("reference"), or name no backend'
        )
    return Choice("reference", f"{watcher} needs torch's own operations") if watcher else choice


def _not_served(name: str) -> str:
    """What watches the call that this implementation cannot serve; "" where it serves."""
    if name not in OWN_OPERATIONS and native.is_transformed():
        return "forward-mode AD or a transform of torch.func"
    if name not in TRACEABLE and native.is_jit_traced():
        return "torch.jit.trace"
    return ""


def implementation(implementations: Mapping[str, Any], choice: Choice, *sizes: int) -> Callable[..., Any]:
    """The chosen one. Where a size is 0 the reference: there is nothing to be fast at, and torch's own operations
    know what nothing is."""
    return implementations["reference" if 0 in sizes else choice.name]


def empty_read(v: Tensor, *inputs: Tensor) -> Tensor:
    """What no queries read, [b, 0, h, v]: a function of all inputs, whose gradients are zeros."""
    return sum((x.narrow(0, 0, 0).sum() for x in inputs), start=v[:, :0])
