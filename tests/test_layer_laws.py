"""Every blend × mixer × write rule satisfies the laws of a memory, and all backends agree."""

from __future__ import annotations

import functools

import pytest
import torch

from hqlt import ops
from hqlt.ops.backend import IMPLEMENTATIONS
from tests.laws import Laws, close, gradients, normal
from tests.layers import CHOICES, EVERY_STATE, as_memory, build_layer

BACKENDS = sorted(
    {name for op in ("delta_rule", "linear_attention", "window_attention") for name in IMPLEMENTATIONS[op]}
    - {"reference", "fla"}  # which needs a GPU
)


class TestLaws(Laws):
    @pytest.fixture(params=CHOICES)
    def build(self, request):
        def build(window):
            return as_memory(build_layer(request.param, CHOICES[request.param].get("window", window)))

        # The state of full attention grows, so states differ in unused slots.
        full = CHOICES[request.param].get("window", 0) is None
        return (lambda window: build(window)._replace(canonical=False)) if full else build


@functools.cache
def long_run(choice, backend):
    """Return outputs, final state and all gradients of several chunks with a reset inside one."""
    memory = as_memory(build_layer(choice, window=5))
    resets = torch.zeros(2, 150, dtype=torch.bool)
    resets[0, 77] = resets[1, 0] = True
    x = memory.inputs(2, 150)
    _, state = memory.reference(memory.inputs(2, 7), None, None)
    with ops.use_backend(backend), torch.no_grad():
        out, after = memory.run(x, state, resets)
    with ops.use_backend(backend):
        return out, *after, *gradients(memory, memory.run, x, state, resets)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("choice", EVERY_STATE)
def test_backends_agree(choice, backend):
    for mine, theirs in zip(long_run(choice, backend), long_run(choice, "reference"), strict=True):
        close(mine, theirs, 1e-9)


@pytest.mark.parametrize("choice", EVERY_STATE)
def test_parameter_gradients_equal_finite_differences(choice):
    layer = build_layer(choice)
    x = normal(1, 6, 8)
    weights = {name: weight.detach().requires_grad_() for name, weight in layer.named_parameters()}

    def run(*changed):
        return torch.func.functional_call(layer, dict(zip(weights, changed, strict=True)), (x,))[0]

    assert torch.autograd.gradcheck(run, tuple(weights.values()), fast_mode=True)
