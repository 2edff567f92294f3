"""RMSNorm, and the vector mixer followed by it, as their equations."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from hqlt.ops.backend import register_backend
from hqlt.shapes import Values


@register_backend("rms_norm", "reference")
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


@register_backend("mix", "reference")
def mix(fw: Values, kv: Values, gate: Tensor, weight: Tensor, eps: float) -> Values:
    return rms_norm(kv + gate.sigmoid() * (fw - kv), weight, eps)
