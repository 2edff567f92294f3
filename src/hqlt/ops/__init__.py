"""The operations of both memories as pure functions: (inputs, state) → (outputs, state)."""

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
    """Translations of this package's custom operators to ONNX, for `torch.onnx.export`.

    Two PyTorch operators that the exporter does not support are included: `cummax` and the stable `sort`.

    Returns:
        A dictionary from operator to translation, to be passed as `custom_translation_table`.

    Raises:
        ModuleNotFoundError: If onnxscript is not installed.

    Example:
        >>> import torch, hqlt
        >>> def export(layer, x, file):
        ...     table = hqlt.ops.onnx_translations()
        ...     torch.onnx.export(layer, (x,), file, dynamo=True, custom_translation_table=table)
    """
    try:
        return importlib.import_module("hqlt.ops.onnx").translations()
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"onnx_translations: expected the package {error.name}, found none; {how_to_install('onnx')}",
            name=error.name,
        ) from error
