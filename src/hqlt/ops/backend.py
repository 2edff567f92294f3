"""Which implementation runs, and why.

Every operation has a readable `reference` and faster twins of the same signature. The first rule that holds for the
call's first argument names the one that runs. A caller may name one (`backend="chunked"`), or force one for a while:

    with hqlt.ops.use_backend("reference"):
        y, state = layer(x)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hqlt import native


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

_forced: str | None = None


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Force the implementation of this name in every operation that has it, until the context ends."""
    global _forced
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def choose(
    op: str, implementations: Mapping[str, Any], rules: tuple[Rule, ...], subject: Tensor, named: str | None
) -> Choice:
    if named is not None:
        if named not in implementations:
            raise ValueError(f"{op}: expected a backend among {', '.join(implementations)}, got {named!r}")
        return Choice(named, "named by the caller")
    if _forced is not None and _forced in implementations:
        return Choice(_forced, "forced by hqlt.ops.use_backend")
    return next(Choice(rule.name, rule.why) for rule in rules if rule.holds(subject))
