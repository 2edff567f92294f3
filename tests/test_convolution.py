from __future__ import annotations

import pytest
import torch

from hqlt.convolution import ShortConvolution
from tests.laws import Laws, Memory, normal


class TestLaws(Laws):
    @pytest.fixture(params=[1, 2, 4])
    def build(self, request):
        convolution = ShortConvolution(3, request.param).double()

        def run(inputs, state, resets):
            """Beside its inputs a convolution needs the position, which the layer's state has."""
            (x,) = inputs
            held = None if state is None else state[:2]
            if x.shape[1] == 0:  # the layer does not ask for nothing
                return x, state or (x.new_zeros(len(x), convolution.size - 1, 3), torch.zeros(len(x)).long())
            out, latest = convolution(x, held, resets)
            position = torch.zeros(len(x), dtype=torch.long) if held is None else held[1]
            for t in range(x.shape[1]):
                position = (position if resets is None else position.masked_fill(resets[:, t], 0)) + 1
            return out, (latest, position)

        return lambda window: Memory(run, run, lambda b, t: (normal(b, t, 3),), (convolution.weight,))


def test_by_hand():
    """Weights (10, 1), the current token's last: 1, then 2 + 10·1, then 3 + 10·2; a reset at the last makes it 3."""
    convolution = ShortConvolution(1, 2)
    with torch.no_grad():
        convolution.weight.copy_(torch.tensor([[10.0, 1.0]]))
    x = torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1)
    assert convolution(x, None, None)[0].flatten().tolist() == [1, 12, 23]
    resets = torch.tensor([[False, False, True]])
    assert convolution(x, None, resets)[0].flatten().tolist() == [1, 12, 3]
