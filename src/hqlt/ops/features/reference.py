"""φ and the rotary embedding as their equations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hqlt.ops.backend import register_backend
from hqlt.shapes import Keys


@register_backend("unit_silu", "reference")
def unit_silu(x: Keys) -> Keys:
    x = F.silu(x)
    return x * torch.rsqrt(x.square().sum(dim=-1, keepdim=True) + 1e-6)


@register_backend("rotated", "reference")
def rotated(x: Keys, cos: Tensor, sin: Tensor) -> Keys:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
