"""Sequence models that serve as an agent's memory. The interface is three methods:

    init_state(rows)              an empty memory for each row
    step(x, state, resets)        one step of all rows: x [b, d], resets Bool[b]
    sequence(x, state, resets)    the same for t steps at once: x [b, t, d], resets Bool[b, t]

Two laws are tested for every model: stepping gives the same result as the sequence pass, and a reset is the same as a
separate sequence.
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
"""Tensors whose first axis is the row, or tuples of such tensors."""


class MemoryModel(nn.Module):
    """Base class of memories: a sequence model whose state is passed in and returned."""

    hidden_size: int
    """d: width of input and output."""

    def init_state(self, rows: int) -> State:
        """Return an empty memory for each row."""
        raise NotImplementedError

    def sequence(self, x: Hidden, state: State, resets: Resets) -> tuple[Hidden, State]:
        """Process t steps.

        Args:
            x ([b, t, d]): inputs.
            state: the memory before the first step.
            resets (Bool[b, t]): True where a row's memory is emptied before the step.

        Returns:
            y ([b, t, d]), and the memory after the last step.
        """
        raise NotImplementedError

    def step(self, x: Tensor, state: State, resets: Tensor) -> tuple[Tensor, State]:
        """Process one step: x [b, d], resets Bool[b] → y [b, d], state. By default a sequence of one step."""
        y, state = self.sequence(x[:, None], state, resets[:, None])
        return y[:, 0], state


class HybridModel(MemoryModel):
    """A stack of blocks with hybrid memory layers, followed by a norm: Transformer, DeltaNet and all blends.

    Args:
        blocks: from first to last.
        norm: applied to the output.

    Example:
        >>> import torch
        >>> from hqlt.agent import build_memory
        >>> model = build_memory("synchronous", hidden_size=16, num_layers=1, window=4)
        >>> x, resets = torch.randn(2, 10, 16), torch.zeros(2, 10, dtype=torch.bool)
        >>> y, state = model.sequence(x, model.init_state(rows=2), resets)
    """

    def __init__(self, blocks: Sequence[Block], norm: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm
        self.hidden_size = blocks[0].memory.hidden_size

    @property
    def layers(self) -> list[HybridMemory]:
        """The memory layers, from first to last."""
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
    """Drop KV entries of earlier episodes, which full attention would otherwise keep."""
    unused = state.slots - min(int(state.position.max()), state.slots)
    return state._replace(kv=tree_map(lambda x: x[:, unused:], state.kv))


class LSTM(MemoryModel):
    """torch's LSTM, with exact resets anywhere in a sequence.

    Args:
        hidden_size (d): width of input, output and state.
        num_layers: number of layers.

    Example:
        >>> import torch
        >>> from hqlt.agent import LSTM
        >>> model = LSTM(hidden_size=16)
        >>> y, state = model.step(torch.randn(2, 16), model.init_state(rows=2), torch.tensor([True, False]))
    """

    def __init__(self, hidden_size: int, num_layers: int = 1) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.lstm = nn.LSTM(hidden_size, hidden_size, num_layers, batch_first=True)

    def init_state(self, rows: int) -> State:
        weight = next(self.parameters())
        zeros = weight.new_zeros(rows, self.lstm.num_layers, self.hidden_size)
        return zeros, zeros

    def sequence(self, x: Hidden, state: State, resets: Resets) -> tuple[Hidden, State]:
        """Run each segment as a separate row; a row's first segment continues from the state unless it is reset."""
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
    """A multilayer perceptron in place of a memory: each step on its own.

    Args:
        hidden_size (d): width of input, hidden layer and output.

    Example:
        >>> import torch
        >>> from hqlt.agent import NoMemory
        >>> NoMemory(16).sequence(torch.randn(2, 5, 16), (), torch.zeros(2, 5, dtype=torch.bool))[0].shape
        torch.Size([2, 5, 16])
    """

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
    """Return the built-in memories, and the blends registered by other packages."""
    return list(dict.fromkeys((*MODELS, *names("blend"))))


def build_memory(
    name: str, *, hidden_size: int = 100, num_heads: int = 2, num_layers: int = 2, window: int | None = 64, **layer: Any
) -> MemoryModel:
    """Build an agent's memory by name. Arguments that do not apply to it, such as `window` for "lstm", are ignored.

    Args:
        name: "transformer", "deltanet", "synchronous", "delayed-streaming", "delayed-chunk", "lstm", "none" (a
            multilayer perceptron), or a registered blend.
        hidden_size (d): width of input and output.
        num_heads: number of heads.
        num_layers: number of layers.
        window (steps): window of the KV-memory; None: the whole episode, for "transformer" and "synchronous".
        layer: other arguments of `hqlt.HybridMemory`; not for "lstm" and "none".

    Returns:
        The model.

    Raises:
        ValueError: when the name or an argument is unknown, or a number is out of range.

    Example:
        >>> from hqlt.agent import build_memory
        >>> model = build_memory("synchronous", hidden_size=64, num_layers=1, window=16, fast_weights="gated-delta")
        >>> model.hidden_size
        64
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
        raise ValueError(f"{', '.join(layer)}: expected a memory made of hqlt.HybridMemory layers, got {name!r}")
    return LSTM(hidden_size, num_layers) if name == "lstm" else NoMemory(hidden_size)
