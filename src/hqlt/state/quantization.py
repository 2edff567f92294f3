"""States in fewer bytes: bfloat16 or int8 for storage and transfer, and 12-bit fast weights between two steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hqlt.memory import MemoryState
from hqlt.memory.state import named
from hqlt.registry import check_choice
from hqlt.state.storage import layers_of, states_from, tensors_of

DTYPES = ("bfloat16", "int8")
SCALE = ".scale"


def pack(states: Sequence[MemoryState], dtype: str | None = None) -> dict[str, Tensor]:
    """Turn several layers' states into named tensors, optionally rounded to take fewer bytes.

    "bfloat16" rounds keys, values, matrices and convolution inputs (relative error at most 2⁻⁹). "int8" rounds keys and
    values to s·q / 127, with an integer q from −127 to 127 and s = max|x| of each channel of a head over the entries
    held; matrices to c·r·q / 127, with c = max|x| of each column and r = max|x / c| of each row; and convolution inputs
    to bfloat16. The scales s, c and r are bfloat16 tensors, stored under the tensor's name followed by ".scale" and a
    number. Everything else (normalizers, scores, gates without channels, positions) stays exact.

    A model continues from a rounded state a little differently than from the exact one; `docs/states.md` measures this.

    Args:
        states: one state per layer.
        dtype: "bfloat16", "int8", or None for no rounding.

    Returns:
        The tensors by name, such as "0.fw.matrix" for layer 0.

    Raises:
        ValueError: when the dtype is unknown.

    Example:
        >>> import torch
        >>> from hqlt import HybridMemory
        >>> from hqlt.state import pack, unpack
        >>> layer = HybridMemory(hidden_size=8, num_heads=2, window=4)
        >>> y, state = layer(torch.randn(1, 20, 8))
        >>> (restored,) = unpack(pack([state], "int8"), layer)
    """
    if dtype is not None:
        check_choice("dtype", dtype, DTYPES)
    packed: dict[str, Tensor] = {}
    for name, x in tensors_of([state.detach() for state in states]).items():
        in_channels = x.is_floating_point() and x.dim() >= 4 and x.numel()  # [b, ·, ·, channels]
        if dtype == "int8" and in_channels:
            packed[name], scales = to_int8(x, (-2, -1) if ".fw." in name else (1,))
            packed |= {f"{name}{SCALE}{i}": scale for i, scale in enumerate(scales)}
        elif dtype is not None and (in_channels or name.endswith(".convolution")):
            packed[name] = x.bfloat16()
        else:
            packed[name] = x
    return packed


def unpack(tensors: Mapping[str, Tensor], module: nn.Module) -> tuple[MemoryState, ...]:
    """Restore the states that `pack` turned into tensors, in the dtypes of the module.

    Args:
        tensors: what `pack` returned, with any dtype.
        module: the layer or model that the states are for.

    Returns:
        One state per layer.

    Raises:
        ValueError: when a tensor of the module's states is missing.

    Example:
        >>> from hqlt import HybridMemory
        >>> from hqlt.state import pack, unpack
        >>> layer = HybridMemory(hidden_size=8, num_heads=2, window=4)
        >>> (state,) = unpack(pack([layer.init_state(3)]), layer)
        >>> state.position
        tensor([0, 0, 0])
    """
    layers = layers_of(module, 1 + max((int(name.partition(".")[0]) for name in tensors), default=-1))
    entries = {
        f"{i}.{name}": (entry, layer) for i, layer in enumerate(layers) for name, entry in named(layer.entries).items()
    }
    if missing := entries.keys() - tensors.keys():
        raise ValueError(f"states: expected the tensors of this module's states, got none named {min(missing)}")

    def restored(name: str) -> Tensor:
        entry, layer = entries[name]
        x = tensors[name].to(entry.dtype_in(layer.like.dtype))
        scales = [tensors[key] for i in range(x.dim()) if (key := f"{name}{SCALE}{i}") in tensors]
        return from_int8(x, scales) if scales else x

    return states_from({name: restored(name) for name in entries}, layers)


def to_int8(x: Tensor, axes: Sequence[int], scales: torch.dtype = torch.bfloat16) -> tuple[Tensor, list[Tensor]]:
    """Return int8 q and one scale per axis, with x ≈ q / 127 · the product of the scales.

    Each scale is the largest |x| along its axis, after division by the scales before it. `scales` is their dtype.
    """
    found = []
    for axis in axes:
        scale = x.abs().amax(dim=axis, keepdim=True).to(scales)
        x = x / scale.to(x.dtype).clamp(min=torch.finfo(torch.float32).tiny)
        found.append(scale)
    return (x * 127).round().clamp(-127, 127).to(torch.int8), found


def from_int8(q: Tensor, scales: Sequence[Tensor]) -> Tensor:
    """The inverse of `to_int8`, in the dtype of q, which has been converted to floating point."""
    x = q / 127
    for scale in scales:
        x = x * scale.to(x.dtype)
    return x


class QuantizedMatrix(NamedTuple):
    """Fast weights in int8 between two steps, and the rounding error in 4 more bits: x ≈ s (q + r / 16) / 127."""

    q: Tensor
    """[b, h, k, v], int8"""
    residual: Tensor
    """r from −8 to 7, two values per byte: [b, h, k, ⌈v / 2⌉], uint8"""
    scale: Tensor
    """s of each column: [b, h, 1, v], float32"""

    def value(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix s q / 127 that the next step reads and updates: [b, h, k, v]."""
        return from_int8(self.q.to(dtype), [self.scale])

    def error(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The rounding error s r / 16 / 127: [b, h, k, v]."""
        both = torch.stack([self.residual & 15, self.residual >> 4], dim=-1).flatten(-2)[..., : self.q.shape[-1]]
        return from_int8((both.to(dtype) - 8) / 16, [self.scale])


def quantize_matrix(x: Tensor, previous: QuantizedMatrix | None = None) -> QuantizedMatrix:
    """Quantize the fast weights after a step to int8 with error feedback.

    The error of the previous rounding is added before the next one, so changes smaller than half a quantization step
    accumulate instead of being lost:

        y = x + error(t − 1)    q, s = int8(y), with a scale s for each column    error(t) = y − s q / 127

    The error itself is rounded to a sixteenth of a quantization step, so a matrix takes 12 bits per element.

    Args:
        x (b, h, k, v): the fast weights after a step that started from `previous.value()`.
        previous: the result for the step before; None at the first step.

    Returns:
        The quantized matrix; `value()` is what the next step starts from.

    Source:
        Seide et al. 2014, "1-bit stochastic gradient descent and its application to data-parallel distributed training
        of speech DNNs", section 3, where it is applied to gradients.

    Example:
        >>> import torch
        >>> from hqlt.state import quantize_matrix
        >>> matrix, quantized = torch.randn(1, 2, 4, 8), None
        >>> for _ in range(100):
        ...     quantized = quantize_matrix(matrix, quantized)
        ...     matrix = quantized.value() + 0.001 * torch.randn(1, 2, 4, 8)
    """
    y = x if previous is None else x + previous.error(x.dtype)
    q, (scale,) = to_int8(y, (-2,), torch.float32)
    steps = 127 * y / scale.to(x.dtype).clamp(min=torch.finfo(torch.float32).tiny)
    rest = ((steps - q) * 16).round().clamp(-8, 7).to(torch.int8) + 8
    low, high = F.pad(rest, (0, rest.shape[-1] % 2), value=8).to(torch.uint8).unflatten(-1, (-1, 2)).unbind(-1)
    return QuantizedMatrix(q, low | high << 4, scale)
