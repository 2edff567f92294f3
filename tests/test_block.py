"""The residual block: a hybrid memory layer and an MLP."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hqlt.layer import Block, SwiGLU
from tests.laws import close, normal
from tests.layers import HIDDEN, ONE_OF_EACH_BLEND, build_layer, tokens


def block(choice):
    return Block(build_layer(choice), SwiGLU(HIDDEN, 12), 1e-6).double()


@pytest.mark.parametrize("choice", ONE_OF_EACH_BLEND)
def test_two_calls_equal_one(choice):
    layer, x = block(choice), tokens(2, 9)
    whole, _ = layer(x)
    first, state = layer(x[:, :4])
    second, _ = layer(x[:, 4:], None, state)
    close(torch.cat([first, second], dim=1), whole)


@pytest.mark.parametrize("choice", ONE_OF_EACH_BLEND)
@pytest.mark.parametrize(("b", "t"), [(0, 4), (0, 0), (2, 0)])
def test_empty_inputs_have_zero_gradients(choice, b, t):
    layer = block(choice)
    x = tokens(b, t).requires_grad_()
    y, state = layer(x)
    y, _ = layer(y, None, state)
    y.sum().backward()
    assert y.shape == x.grad.shape == x.shape
    assert not any(weight.grad.any() for weight in layer.parameters())


@pytest.mark.parametrize("zero_centered", [False, True])
def test_positions_of_the_norms(zero_centered):
    for norms, (before, after) in {"before": (True, False), "after": (False, True), "both": (True, True)}.items():
        layer = Block(build_layer(""), SwiGLU(HIDDEN, 12), 1e-6, norms=norms, zero_centered=zero_centered).double()
        with torch.no_grad():
            for i, (name, weight) in enumerate(layer.named_parameters()):
                weight.copy_(weight if "_norm" not in name else normal(*weight.shape, seed=i))

        def normed(x, norm, wanted, shift=float(zero_centered)):
            return x if not wanted else (shift + norm.weight) * F.rms_norm(x, x.shape[-1:], eps=1e-6)

        x = tokens(2, 5)
        read = layer.memory(normed(x, layer.memory_norm, before))[0]
        between = x + normed(read, layer.memory_out_norm, after)
        added = layer.mlp(normed(between, layer.mlp_norm, before))
        close(layer(x)[0], between + normed(added, layer.mlp_out_norm, after))
