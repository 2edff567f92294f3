"""Mixer and norm as their equations."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from hqlt.shapes import Values


def mix(fw: Values, kv: Values, gate: Tensor, weight: Tensor, eps: float) -> Values:
    m = kv + gate.sigmoid() * (fw - kv)
    return F.rms_norm(m, weight.shape, weight, eps)
