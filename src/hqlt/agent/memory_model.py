"""What an agent remembers with: three methods, and anything that has them will do.

    init_state(rows)              an empty memory for each row
    step(x, state, resets)        one step of all rows: x [b, d], resets Bool[b]
    sequence(x, state, resets)    the same for t steps at once: x [b, t, d], resets Bool[b, t]

Laws, tested for every model here: stepping says what the sequence pass says, and a reset is a separate sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils._pytree import tree_map

from hqlt.layer import Block, HybridMemory, RMSNorm, SwiGLU, arguments_of, layer_arguments
from hqlt.memory import MemoryState
from hqlt.ranges import COUNT, check_range
from hqlt.registry import check_choice, names
from hqlt.shapes import Hidden, Resets

State: TypeAlias = tuple[Any, ...]
"""Tensors whose first axis is the row, or tuples of such."""


class MemoryModel(nn.Module):
    """A sequence model whose state is passed in and returned."""

    hidden_size: int
    """d: the width of what goes in and comes out."""

    def init_state(self, rows: int) -> State:
        """An empty memory for each row."""
        raise NotImplementedError

    def sequence(self, x: Hidden, state: State, resets: Resets) -> tuple[Hidden, State]:
        """x: [b, t, d]; resets: Bool[b, t], True where a row begins anew, before its x is read → y [b, t, d], state."""
        raise NotImplementedError

    def step(self, x: Tensor, state: State, resets: Tensor) -> tuple[Tensor, State]:
        """x: [b, d]; resets: Bool[b] → y [b, d], state. A sequence of one step, unless a model knows better."""
        y, state = self.sequence(x[:, None], state, resets[:, None])
        return y[:, 0], state


class HybridModel(MemoryModel):
    """A stack of blocks of hybrid memories, then a norm: Transformer, DeltaNet and the blends, by their layers."""

    def __init__(self, blocks: Sequence[Block], norm: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm
        self.hidden_size = blocks[0].memory.hidden_size

    @property
    def layers(self) -> list[HybridMemory]:
        return [cast(Block, block).memory for block in self.blocks]

    def init_state(self, rows: int) -> State:
        return tuple(layer.init_state(rows) for layer in self.layers)

    def sequence(self, x: Hidden, state: State, resets: Resets) -> tuple[Hidden, State]:
        states = []
        for block, layer, before in zip(self.blocks, self.layers, state, strict=True):
            x, after = block(x, resets, before)
            states.append(drop_unused_entries(after) if layer.blend.slots is None else after)
        return self.norm(x), tuple(states)


def drop_unused_entries(state: MemoryState) -> MemoryState:
    """Full attention holds every pair of a row, but no longer those of its earlier episodes."""
    unused = state.slots - min(int(state.position.max()), state.slots)
    return state._replace(kv=tree_map(lambda x: x[:, unused:], state.kv))


class LSTM(MemoryModel):
    """torch's LSTM, the baseline that everyone knows. Rows may begin anew anywhere in a sequence, exactly."""

    def __init__(self, hidden_size: int, num_layers: int = 1) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.lstm = nn.LSTM(hidden_size, hidden_size, num_layers, batch_first=True)

    def init_state(self, rows: int) -> State:
        weight = next(self.parameters())
        zeros = weight.new_zeros(rows, self.lstm.num_layers, self.hidden_size)
        return zeros, zeros

    def sequence(self, x: Hidden, state: State, resets: Resets) -> tuple[Hidden, State]:
        """Every segment is a row of its own for the LSTM; a row's first goes on from the state unless it is reset."""
        b, t, _ = x.shape
        begins = resets.clone()
        begins[:, 0] = True
        segment = begins.flatten().cumsum(0).view(b, t) - 1
        lengths = segment.flatten().bincount()
        place = torch.arange(b * t, device=x.device).view(b, t) - (lengths.cumsum(0) - lengths)[segment]
        padded = x.new_zeros(len(lengths), int(lengths.max()), x.shape[-1]).index_put((segment, place), x)
        first, last = segment[:, 0], segment[:, -1]
        carried = [
            part.new_zeros(len(lengths), *part.shape[1:]).index_copy(0, first, part * ~resets[:, :1, None])
            for part in state
        ]
        packed = pack_padded_sequence(padded, lengths.cpu(), batch_first=True, enforce_sorted=False)
        out, after = self.lstm(packed, tuple(part.transpose(0, 1).contiguous() for part in carried))
        y = pad_packed_sequence(out, batch_first=True)[0][segment, place]
        return y, tuple(part.transpose(0, 1)[last] for part in after)


class NoMemory(MemoryModel):
    """A multilayer perceptron at each step: what can be done without remembering anything."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.mlp = nn.Sequential(
            nn.Linear(hidden_size, hidden_size), nn.ReLU(), nn.Linear(hidden_size, hidden_size), nn.ReLU()
        )

    def init_state(self, rows: int) -> State:
        return ()

    def sequence(self, x: Hidden, state: State, resets: Resets) -> tuple[Hidden, State]:
        return self.mlp(x), ()


BLENDS = {
    "transformer": "kv-only",
    "deltanet": "fw-only",
    "synchronous": "synchronous",
    "delayed-streaming": "delayed-streaming",
    "delayed-chunk": "delayed-chunk",
}
MODELS = (*BLENDS, "lstm", "none")


def memory_names() -> list[str]:
    """Ours, and the blends that others registered."""
    return list(dict.fromkeys((*MODELS, *names("blend"))))


def build_memory(
    name: str, *, hidden_size: int = 100, num_heads: int = 2, num_layers: int = 2, window: int | None = 64, **layer: Any
) -> MemoryModel:
    """One of "transformer", "deltanet", "synchronous", "delayed-streaming", "delayed-chunk", "lstm", "none".

    window: steps that the KV-memory reaches (None: the whole episode, for "transformer" and "synchronous"); what has no
    window, heads or layers does without. layer: other arguments of `hqlt.HybridMemory`, for the first five.
    """
    check_choice("memory", name, memory_names())
    own = ("hidden_size", "num_heads", "num_layers", "window")
    for option in layer:
        check_choice("argument", option, sorted({*own, *layer_arguments()} - {"blend"}))
    for option, value in zip(own, (hidden_size, num_heads, num_layers, window), strict=True):
        if value is not None or option != "window":
            check_range(option, value, COUNT)
    if name not in ("lstm", "none"):
        blend = BLENDS.get(name, name)
        used = arguments_of(blend, *(layer.get(choice) for choice in ("mixer", "fast_weights", "retention")))
        by_layer = [{"depth": (i, num_layers)} if "depth" in used else {} for i in range(num_layers)]
        blocks = [
            Block(
                HybridMemory(hidden_size, num_heads, window, blend, **{**own, **layer}),
                SwiGLU(hidden_size, 2 * hidden_size),
                norm_eps=1e-6,
            )
            for own in by_layer
        ]
        return HybridModel(blocks, RMSNorm(hidden_size, eps=1e-6))
    if layer:
        raise ValueError(f"{', '.join(layer)}: expected with a blend of memories alone, got with {name!r}")
    return LSTM(hidden_size, num_layers) if name == "lstm" else NoMemory(hidden_size)
