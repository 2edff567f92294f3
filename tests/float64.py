"""transformers' code in float64, so that comparisons are exact up to rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor


class Float64:
    """`torch`, with float64 in place of float32."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def in_float64(model: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the module of a transformers model, patched to compute in float64 wherever it would use float32."""
    module = pytest.importorskip(f"transformers.models.{model}.modeling_{model}", reason=f"no {model} in this version")
    monkeypatch.setattr(module, "torch", Float64())
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    return module
