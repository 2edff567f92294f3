"""A block: the layer and a multilayer perceptron, each added to what it read."""

from __future__ import annotations

import pytest
import torch

from hqlt.layer import Block, SwiGLU
from tests.laws import close
from tests.layers import HIDDEN, ONE_OF_EACH_BLEND, build_layer, tokens


def block(choice):
    return Block(build_layer(choice), SwiGLU(HIDDEN, 12), 1e-6).double()


@pytest.mark.parametrize("choice", ONE_OF_EACH_BLEND)
def test_in_pieces_is_at_once(choice):
    layer, x = block(choice), tokens(2, 9)
    whole, _ = layer(x)
    first, state = layer(x[:, :4])
    second, _ = layer(x[:, 4:], None, state)
    close(torch.cat([first, second], dim=1), whole)


@pytest.mark.parametrize("choice", ONE_OF_EACH_BLEND)
@pytest.mark.parametrize(("b", "t"), [(0, 4), (0, 0), (2, 0)])
def test_nothing_in_gives_nothing_out_and_gradients_of_zero(choice, b, t):
    layer = block(choice)
    x = tokens(b, t).requires_grad_()
    y, state = layer(x)
    y, _ = layer(y, None, state)
    y.sum().backward()
    assert y.shape == x.grad.shape == x.shape
    assert not any(weight.grad.any() for weight in layer.parameters())
