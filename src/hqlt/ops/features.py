"""What is done to a query or key before a memory sees it: φ for the FW-memory, a rotation for the KV-memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hqlt.shapes import Keys


def unit_silu(x: Keys) -> Keys:
    """φ of the delta rule: SiLU(x) / √(‖SiLU(x)‖² + 1e-6), over each head."""
    x = F.silu(x)
    return x * torch.rsqrt(x.square().sum(dim=-1, keepdim=True) + 1e-6)


def rotated(x: Keys, cos: Tensor, sin: Tensor) -> Keys:
    """Rotate each pair (x_i, x_{i+k/2}) of a head by its position's angle. x: [b, l, h, k]; cos, sin: [l, 1, k/2]."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.to(x.dtype)
