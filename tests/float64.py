"""transformers' code in float64, so that what agrees with it does to rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor


class Float64:
    """`torch`, where float32 is called float64."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def in_float64(model: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model's code of transformers; what it computes in float32, whatever it is given, it computes in float64."""
    module = pytest.importorskip(f"transformers.models.{model}.modeling_{model}", reason=f"no {model} in this version")
    monkeypatch.setattr(module, "torch", Float64())
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    return module
