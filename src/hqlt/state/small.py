"""States in fewer bytes: bfloat16 or int8 for a store and the wire, and fast weights in 12 bits between two steps."""

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
    """The tensors of several layers' states by name, "0.fw.matrix", the large ones of them rounded.

    dtype: None leaves all as they are. "bfloat16" rounds keys, values, matrices and the inputs of a convolution (by 2⁻⁹
    of each number at most). "int8" rounds keys and values to s q / 127, with whole numbers q from −127 to 127 and
    s = max|x| of each head's channel over the entries held; matrices to c r q / 127, with c = max|x| of each column and
    r = max|x / c| of each row; and the inputs of a convolution to bfloat16. s, c and r are bfloat16, and held under the
    name with ".scale" and a number behind it. What adds up in no matrix (normalisers, scores), gates without channels,
    and what counts stays exact.

    What a model makes of a rounded state differs from what it makes of the state: `docs/states.md` says by how much.
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
    """The states that were packed, in whichever form, for the layers of this module and in its dtypes.

    Raises ValueError for tensors of another module's states.
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
    """q and scales, x ≈ q / 127 · their product: each in turn the largest |x| over an axis of what the others leave."""
    found = []
    for axis in axes:
        scale = x.abs().amax(dim=axis, keepdim=True).to(scales)
        x = x / scale.to(x.dtype).clamp(min=torch.finfo(torch.float32).tiny)
        found.append(scale)
    return (x * 127).round().clamp(-127, 127).to(torch.int8), found


def from_int8(q: Tensor, scales: Sequence[Tensor]) -> Tensor:
    """In the dtype that q has been brought to."""
    x = q / 127
    for scale in scales:
        x = x * scale.to(x.dtype)
    return x


class Kept(NamedTuple):
    """Fast weights kept in int8 between two steps, and what rounding has left over: x ≈ s (q + r / 16) / 127."""

    numbers: Tensor
    """q, int8 [b, h, k, v]"""
    rest: Tensor
    """r from −8 to 7, two in each byte: uint8 [b, h, k, ⌈v / 2⌉]"""
    scale: Tensor
    """s, float32 [b, h, 1, v]"""

    def value(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """s q / 127: what the next step reads and writes to."""
        return from_int8(self.numbers.to(dtype), [self.scale])

    def left_over(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """s r / 16 / 127"""
        both = torch.stack([self.rest & 15, self.rest >> 4], dim=-1).flatten(-2)[..., : self.numbers.shape[-1]]
        return from_int8((both.to(dtype) - 8) / 16, [self.scale])


def keep(x: Tensor, before: Kept | None = None) -> Kept:
    """Round the fast weights after a step, with error feedback: what the last rounding left over is added first.

        y = x + rest(t − 1)    q, s = int8(y), s for each column    rest(t) = y − s q / 127

    The rest is rounded itself, to a sixteenth of a step. So changes of less than half a step add up instead of being
    lost, in 12 bits a number. x: [b, h, k, v] after a step that began from `before.value()`.

    Source: Seide et al. 2014, "1-bit stochastic gradient descent and its application to data-parallel distributed
    training of speech DNNs", section 3, there for gradients.
    """
    y = x if before is None else x + before.left_over(x.dtype)
    numbers, (scale,) = to_int8(y, (-2,), torch.float32)
    steps = 127 * y / scale.to(x.dtype).clamp(min=torch.finfo(torch.float32).tiny)
    rest = ((steps - numbers) * 16).round().clamp(-8, 7).to(torch.int8) + 8
    low, high = F.pad(rest, (0, rest.shape[-1] % 2), value=8).to(torch.uint8).unflatten(-1, (-1, 2)).unbind(-1)
    return Kept(numbers, low | high << 4, scale)
