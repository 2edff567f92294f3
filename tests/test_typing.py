"""Calls of modules are typed for checkers: mypy checks this file with the package, and pytest runs it."""

from __future__ import annotations

from typing import assert_type

import torch
from torch import Tensor

from hqlt import HybridMemory, MemoryState, with_retention
from hqlt.blend import Memories, Reads, Tokens
from hqlt.layer import Block, RMSNorm, ShortConvolution, SwiGLU

x = torch.randn(1, 3, 8)


def test_a_layer_returns_outputs_and_state() -> None:
    layer = with_retention(HybridMemory(8, 2, window=4), kept=2)
    y, state = assert_type(layer(x), tuple[Tensor, MemoryState])
    y, state = layer(x, state=state, resets=torch.zeros(1, 3, dtype=torch.bool))
    assert y.shape == x.shape
    assert state.position.tolist() == [6]


def test_a_block_returns_outputs_and_state() -> None:
    block = Block(HybridMemory(8, 2, window=4), SwiGLU(8, 16), norm_eps=1e-6)
    y, _ = assert_type(block(x), tuple[Tensor, MemoryState])
    assert_type(block.mlp(y), Tensor)
    assert_type(RMSNorm(8, eps=1e-6)(y), Tensor)
    assert_type(ShortConvolution(8, 3)(y, None, None), tuple[Tensor, Tensor])


def test_parts_of_a_layer() -> None:
    layer = HybridMemory(8, 2, window=4, retention="value-norm", kept=2)
    projected, _ = layer.project(x, None, None)
    new: Tokens = layer.parts().tokens(projected)
    reads, _ = assert_type(layer.blend(Memories(layer.kv, layer.fw), new, None, None), tuple[Reads, MemoryState])
    assert_type(layer.mixer(projected.gate, reads), Tensor)
