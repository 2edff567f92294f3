from __future__ import annotations

import pytest
import torch

from hqlt.layer import ShortConvolution
from tests.laws import Laws, Memory, normal


class TestLaws(Laws):
    @pytest.fixture(params=[1, 2, 4])
    def build(self, request):
        convolution = ShortConvolution(3, request.param).double()

        def run(inputs, state, resets):
            """The state is the latest inputs and the position, which the layer provides."""
            (x,) = inputs
            held = None if state is None else state[:2]
            out, latest = convolution(x, held, resets)
            position = torch.zeros(len(x), dtype=torch.long) if held is None else held[1]
            for t in range(x.shape[1]):
                position = (position if resets is None else position.masked_fill(resets[:, t], 0)) + 1
            return out, (latest, position)

        return lambda window: Memory(run, run, lambda b, t: (normal(b, t, 3),), (convolution.weight,))


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize(("b", "t"), [(0, 4), (0, 0), (2, 0)])
def test_empty_inputs(b, t, size):
    convolution = ShortConvolution(3, size)
    for resets in (None, torch.ones(b, t, dtype=torch.bool)):
        out, latest = convolution(torch.randn(b, t, 3), None, resets)
        assert out.shape == (b, t, 3) and latest.shape == (b, size - 1, 3)
        out.sum().backward()
        assert not convolution.weight.grad.any()


def test_by_hand():
    """Weights (10, 1), the current token's last: 1, 2 + 10·1, 3 + 10·2; a reset at the third token makes it 3."""
    convolution = ShortConvolution(1, 2)
    with torch.no_grad():
        convolution.weight.copy_(torch.tensor([[10.0, 1.0]]))
    x = torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1)
    assert convolution(x, None, None)[0].flatten().tolist() == [1, 12, 23]
    resets = torch.tensor([[False, False, True]])
    assert convolution(x, None, resets)[0].flatten().tolist() == [1, 12, 3]
