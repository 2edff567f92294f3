"""States in fewer bytes, for a store and for the wire: bfloat16, or int8 with a scale for each row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from hqlt.memory import MemoryState
from hqlt.memory.state import named
from hqlt.registry import one_of
from hqlt.state.storage import layers_of, states_from, tensors_of

FORMS = ("bfloat16", "int8")
SCALE = ".scale"


def pack(states: Sequence[MemoryState], form: str | None = None) -> dict[str, Tensor]:
    """The tensors of several layers' states by name, "0.fw.matrix", the large ones of them rounded.

    form: None leaves all as they are. "bfloat16" rounds keys, values, matrices and the inputs of a convolution (by 2⁻⁹
    of each number at most). "int8" rounds each row x of keys, values and matrices to s q, with whole numbers q from
    −127 to 127 and s = max|x| / 127 in bfloat16, held under the name with ".scale" behind it. What adds up without a
    row of its own (gates, normalisers, scores) and what counts stays exact.

    What a model makes of a rounded state differs from what it makes of the state: `docs/states.md` says by how much.
    """
    if form is not None:
        one_of("form", form, FORMS)
    packed: dict[str, Tensor] = {}
    for name, x in tensors_of([state.detach() for state in states]).items():
        in_rows = x.is_floating_point() and x.dim() >= 4  # [b, ·, ·, width]
        if form == "int8" and in_rows:
            packed[name], packed[name + SCALE] = to_int8(x)
        elif form is not None and (in_rows or name.endswith(".convolution")):
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
        dtype = entry.dtype_in(layer.like.dtype)
        scale = tensors.get(name + SCALE)
        return tensors[name].to(dtype) if scale is None else tensors[name].to(dtype) * scale.to(dtype)

    return states_from({name: restored(name) for name in entries}, layers)


def to_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """q, s with x ≈ q s: q int8, s [b, ·, ·, 1] in bfloat16, one for each row of the last axis."""
    scale = (x.abs().amax(dim=-1, keepdim=True) / 127).bfloat16()
    steps = x / scale.to(x.dtype).clamp(min=torch.finfo(x.dtype).tiny)
    return steps.round().clamp(-127, 127).to(torch.int8), scale
