"""One block of the language model."""

from __future__ import annotations

from transformers.modeling_layers import GradientCheckpointingLayer

from hqlt.block import Block


class HQLTBlock(Block, GradientCheckpointingLayer):
    """A block that transformers can checkpoint: computed again in the backward pass instead of kept."""
