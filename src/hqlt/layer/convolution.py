"""A short causal convolution over time that stops at resets."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hqlt.ops.segments import positions
from hqlt.shapes import Resets


class ShortConvolution(nn.Module):
    """out_t = Σ_{j<size} w_j ⊙ x_{t−j}, one weight a channel and tap, over the tokens of t's own segment.

    weight: [channels, size], the current token's tap last.
    """

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"conv_size: expected 0 (none) or a number of taps, got {size}")
        self.size = size
        self.weight = nn.Parameter(torch.empty(channels, size))
        nn.init.uniform_(self.weight, -1 / math.sqrt(size), 1 / math.sqrt(size))

    def forward(self, x: Tensor, held: tuple[Tensor, Tensor] | None, resets: Resets | None) -> tuple[Tensor, Tensor]:
        """x: [b, t, channels]; held: the size − 1 inputs before it, and how many tokens the segment already has [b].

        → out [b, t, channels], and the latest size − 1 inputs, zeros before a segment's first token.
        """
        b, t, channels = x.shape
        if held is None:
            held = x.new_zeros(b, self.size - 1, channels), torch.zeros(b, dtype=torch.long, device=x.device)
        before, position = held
        inputs = torch.cat([before.to(x.dtype), x], dim=1)
        where = positions(resets, position, t)
        out = x * self.weight[:, -1]
        for j in range(1, self.size):
            earlier = inputs[:, self.size - 1 - j : self.size - 1 - j + t]
            if resets is not None:  # without any, what came before a segment's first token is zero already
                earlier = earlier.masked_fill((where < j)[..., None], 0)
            out = torch.addcmul(out, earlier, self.weight[:, -1 - j])
        age = torch.arange(self.size - 1, 0, -1, device=x.device)
        unused = age > (where[:, -1:] + 1 if t else position[:, None])
        return out, inputs[:, t:].masked_fill(unused[..., None], 0)

    def extra_repr(self) -> str:
        return f"channels={len(self.weight)}, size={self.size}"
