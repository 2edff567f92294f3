"""The memories' reads and writes as pure functions: (inputs, state) → (outputs, state)."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from hqlt.errors import how_to_install
from hqlt.ops.backend import Choice, explain, register_backend, use_backend
from hqlt.ops.delta_rule import delta_rule
from hqlt.ops.expiry import expiry
from hqlt.ops.fast_weights import fast_weights
from hqlt.ops.features import rotated, unit_silu
from hqlt.ops.linear_attention import LinearState, linear_attention
from hqlt.ops.norm import mix, rms_norm
from hqlt.ops.synchronous import synchronous
from hqlt.ops.window_attention import Beyond, window_attention

__all__ = [
    "Beyond",
    "Choice",
    "LinearState",
    "delta_rule",
    "expiry",
    "explain",
    "fast_weights",
    "linear_attention",
    "mix",
    "onnx_translations",
    "register_backend",
    "rms_norm",
    "rotated",
    "synchronous",
    "unit_silu",
    "use_backend",
    "window_attention",
]


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
