"""The memories' reads and writes as pure functions: (inputs, state) → (outputs, state)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hqlt.ops import delta_rule as _delta_rule
from hqlt.ops import linear_attention as _linear_attention
from hqlt.ops import synchronous as _synchronous
from hqlt.ops import window_attention as _window_attention
from hqlt.ops.backend import Choice, use_backend
from hqlt.ops.delta_rule import delta_rule
from hqlt.ops.linear_attention import LinearState, linear_attention
from hqlt.ops.synchronous import synchronous
from hqlt.ops.window_attention import window_attention

__all__ = [
    "Choice",
    "LinearState",
    "delta_rule",
    "explain",
    "linear_attention",
    "synchronous",
    "use_backend",
    "window_attention",
]


def explain(op: str, q: Tensor, **options: Any) -> Choice:
    """Which implementation of `op` would run on queries q [b, t, h, k], and why.

    >>> hqlt.ops.explain("window_attention", q, window=64)
    Choice(name='blocked', why='many windows in the sequence: work linear in length')
    """
    explainers = {
        "delta_rule": _delta_rule.explain,
        "linear_attention": _linear_attention.explain,
        "synchronous": _synchronous.explain,
        "window_attention": _window_attention.explain,
    }
    if op not in explainers:
        raise ValueError(f"op: expected one of {', '.join(explainers)}, got {op!r}")
    return explainers[op](q, **options)
