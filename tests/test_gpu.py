"""Layers give the same results on a GPU as on a CPU."""

from __future__ import annotations

import pytest
import torch

from hqlt import HybridMemory, ops
from tests.laws import close
from tests.layers import CHOICES, build_layer, tokens

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def results(layer: HybridMemory, device: str) -> list[torch.Tensor]:
    """Outputs, final state and gradients of two calls with resets."""
    layer = layer.to(device)
    x = tokens(2, 100).to(device).requires_grad_()
    resets = torch.zeros(2, 100, dtype=torch.bool, device=device)
    resets[0, 20] = resets[1, 70] = True
    before, state = layer(x[:, :60], resets=resets[:, :60])
    after, state = layer(x[:, 60:], state, resets[:, 60:])
    gradients = torch.autograd.grad(before.square().sum() + after.square().sum(), [x, *layer.parameters()])
    return [z.cpu() for z in (before, after, *state.leaves(), *gradients)]


@pytest.mark.parametrize("backend", [None, "reference", "chunked", "blocked", "dense"])
@pytest.mark.parametrize("choice", CHOICES)
def test_layers(choice, backend):
    layer = build_layer(choice, CHOICES[choice].get("window", 4))
    expected = results(layer, "cpu")
    with ops.use_backend(backend):
        for mine, theirs in zip(results(layer, "cuda"), expected, strict=True):
            close(mine, theirs, 1e-9)
