"""A short causal convolution over time that does not cross resets."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hqlt.ops.segments import positions
from hqlt.shapes import Resets


class ShortConvolution(nn.Module):
    """A depthwise causal convolution, out_t = Σ_{j<size} w_j ⊙ x_{t−j}, over tokens of the same segment.

    The parameter `weight` is [channels, size], with the current token's tap last.

    Args:
        channels: number of channels.
        size (taps): number of tokens that contribute to an output, the current one included.

    Raises:
        ValueError: when the size is below 1.

    Example:
        >>> import torch
        >>> from hqlt.layer import ShortConvolution
        >>> out, latest = ShortConvolution(channels=8, size=4)(torch.randn(2, 5, 8), None, None)
        >>> latest.shape
        torch.Size([2, 3, 8])
    """

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"conv_size: expected 0 (no convolution) or a positive number of taps, got {size}")
        self.size = size
        self.weight = nn.Parameter(torch.empty(channels, size))
        nn.init.uniform_(self.weight, -1 / math.sqrt(size), 1 / math.sqrt(size))

    def forward(self, x: Tensor, held: tuple[Tensor, Tensor] | None, resets: Resets | None) -> tuple[Tensor, Tensor]:
        """Convolve a batch of sequences.

        Args:
            x ([b, t, channels]): the inputs.
            held: the size − 1 inputs before x, and the number of tokens that each segment already has [b]. Default:
                x begins new segments.
            resets (Bool[b, t]): True for each token that begins a new segment. Default: no resets.

        Returns:
            The outputs [b, t, channels], and the latest size − 1 inputs, with zeros before a segment's first token.
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
            if resets is not None:  # without resets, inputs before the segment's first token are zero already
                earlier = earlier.masked_fill((where < j)[..., None], 0)
            out = torch.addcmul(out, earlier, self.weight[:, -1 - j])
        age = torch.arange(self.size - 1, 0, -1, device=x.device)
        unused = age > (where[:, -1:] + 1 if t else position[:, None])
        return out, inputs[:, t:].masked_fill(unused[..., None], 0)

    if TYPE_CHECKING:
        __call__ = forward

    def extra_repr(self) -> str:
        return f"channels={len(self.weight)}, size={self.size}"
