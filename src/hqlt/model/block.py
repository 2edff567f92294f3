"""One block of the language model."""

from __future__ import annotations

from typing import Any

from transformers.modeling_layers import GradientCheckpointingLayer

from hqlt.layer import Block
from hqlt.memory import MemoryState
from hqlt.shapes import Hidden, Resets


class HQLTBlock(Block, GradientCheckpointingLayer):
    """A block that supports transformers' gradient checkpointing.

    Checkpointing only tracks tensors, so the state is passed as a flat sequence of tensors and rebuilt inside the
    block. Gradients then flow through a carried state with and without checkpointing.
    """

    def __call__(self, x: Hidden, resets: Resets | None = None, state: MemoryState | None = None) -> Any:
        if not (self.gradient_checkpointing and self.training):
            return super().__call__(x, resets, state)
        called: Any = super().__call__(x, resets, *(() if state is None else state.leaves()))
        x, *leaves = called
        return x, self.memory.state_of(leaves)

    def forward(self, x: Hidden, resets: Resets | None = None, *state: Any) -> Any:
        if not (self.gradient_checkpointing and self.training):
            return super().forward(x, resets, *state)
        before = self.memory.state_of(state) if state else None
        x, after = super().forward(x, resets, before)
        return x, *after.leaves()
