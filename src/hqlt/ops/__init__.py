"""The memories' reads and writes as pure functions: (inputs, state) → (outputs, state)."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from hqlt.errors import how_to_install
from hqlt.ops import delta_rule as _delta_rule
from hqlt.ops import features as _features
from hqlt.ops import linear_attention as _linear_attention
from hqlt.ops import norm as _norm
from hqlt.ops import synchronous as _synchronous
from hqlt.ops import window_attention as _window_attention
from hqlt.ops.backend import Choice, use_backend
from hqlt.ops.delta_rule import delta_rule
from hqlt.ops.features import rotated, unit_silu
from hqlt.ops.linear_attention import LinearState, linear_attention
from hqlt.ops.norm import mix, rms_norm
from hqlt.ops.synchronous import synchronous
from hqlt.ops.window_attention import window_attention

__all__ = [
    "Choice",
    "LinearState",
    "delta_rule",
    "explain",
    "linear_attention",
    "mix",
    "onnx_translations",
    "rms_norm",
    "rotated",
    "synchronous",
    "unit_silu",
    "use_backend",
    "window_attention",
]


def explain(op: str, q: Tensor, **options: Any) -> Choice:
    """Which implementation of `op` would run on queries q [b, t, h, k], and why.

    >>> hqlt.ops.explain("window_attention", q, window=64)
    Choice(name='blocked', why='many windows in the sequence: work linear in length')
    """
    explainers: dict[str, Callable[..., Choice]] = {
        "delta_rule": _delta_rule.explain,
        "linear_attention": _linear_attention.explain,
        "synchronous": _synchronous.explain,
        "window_attention": _window_attention.explain,
        **{name: partial(_features.explain, name) for name in _features.IMPLEMENTATIONS},
        **{name: partial(_norm.explain, name) for name in _norm.IMPLEMENTATIONS},
    }
    if op not in explainers:
        raise ValueError(f"op: expected one of {', '.join(explainers)}, got {op!r}")
    return explainers[op](q, **options)


def onnx_translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """This package's operators in ONNX, as `torch.onnx.export` takes them.

    >>> torch.onnx.export(layer, (x,), dynamo=True, custom_translation_table=hqlt.ops.onnx_translations())

    Two of torch's operators, which its exporter does not know, are among them (`cummax` and a stable `sort`).

    Raises ModuleNotFoundError without onnxscript.
    """
    try:
        return importlib.import_module("hqlt.ops.onnx").translations()
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"onnx_translations: expected the package {error.name}, found none; {how_to_install('onnx')}",
            name=error.name,
        ) from error
