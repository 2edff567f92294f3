"""Keys and values that DeltaProduct projects itself are processed like the layer's own."""

from __future__ import annotations

import pytest
import torch

from hqlt.memory import Heads
from hqlt.memory.fw import DeltaProductMemory
from tests.laws import close
from tests.layers import build_layer, tokens


@pytest.mark.parametrize("changes", [{}, {"fw_activation": None}, {"num_value_heads": 4, "value_dim": 3}])
def test_equal_weights_give_equal_keys_and_values(changes):
    """Including convolution and activation."""
    layer = build_layer("", blend="fw-only", fast_weights="delta-product", conv_size=3, num_householder=3, **changes)
    widths = [part.weight.shape[0] for part in (layer.q_proj, layer.k_proj, layer.v_proj)]
    with torch.no_grad():
        _, *taps, k_taps, v_taps = layer.conv.weight.split([*widths, 2 * widths[1], 2 * widths[2]])
        layer.fw.k_proj.weight.copy_(layer.k_proj.weight.repeat(2, 1))
        layer.fw.v_proj.weight.copy_(layer.v_proj.weight.repeat(2, 1))
        k_taps.copy_(taps[0].repeat(2, 1))
        v_taps.copy_(taps[1].repeat(2, 1))
    projected, _ = layer.project(tokens(2, 7), None, None)
    new = layer.parts().tokens(projected)
    own_keys = new.keys[:, :, :: layer.heads.matrices // layer.heads.keys]  # the layer repeats them for value heads
    for own, extra in ((own_keys, new.gates.keys), (new.values, new.gates.values)):
        for i in range(2):
            close(extra[:, :, i], own)


def test_one_write_is_rejected():
    with pytest.raises(ValueError, match=r"num_householder: expected at least 2 writes .* 'gated-delta'"):
        DeltaProductMemory(Heads.of(8, 2, None, None, None, None, alone=True), num_householder=1)
