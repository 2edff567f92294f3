from __future__ import annotations

import pytest
import torch

from hqlt import HybridMemory
from hqlt.blend import Reads
from hqlt.memory import Heads
from hqlt.mixer import AddMixer, ScalarMixer, SumMixer, VectorMixer
from tests.laws import close, normal

B, T, H, V = 2, 3, 2, 4
HEADS = Heads(H * V, H, H, H, V, V)
MIXERS = {"vector": VectorMixer(HEADS), "scalar": ScalarMixer(HEADS), "sum": SumMixer(HEADS), "add": AddMixer(HEADS)}
MIXERS["add, kv_gate"] = AddMixer(HEADS, kv_gate=True)
for mixer in MIXERS.values():
    for weight in mixer.double().parameters():
        weight.data = normal(*weight.shape)


@pytest.mark.parametrize("mixer", MIXERS.values(), ids=MIXERS)
def test_mix_is_the_sum_of_gated_reads(mixer):
    x, reads = normal(B, T, H * V), Reads(normal(B, T, H, V, seed=1), normal(B, T, H, V, seed=2))
    fw, kv = mixer.gates(mixer.logits(x))
    close(mixer(mixer.logits(x), reads), fw * reads.fw + kv * reads.kv)


def test_vector_gates_sum_to_one_and_gamma_multiplies_fw():
    mixer = VectorMixer(HEADS).double()
    fw, kv = mixer.gates(mixer.logits(normal(B, T, H * V)))
    close(fw + kv, torch.ones_like(fw))
    with torch.no_grad():
        mixer.gate_proj.weight.fill_(100)
    fw, _ = mixer.gates(mixer.logits(torch.ones(B, T, H * V, dtype=torch.float64)))
    close(fw, torch.ones_like(fw))


def test_scalar_gates_are_independent_and_per_head():
    fw, kv = MIXERS["scalar"].gates(MIXERS["scalar"].logits(normal(B, T, H * V)))
    assert fw.shape == kv.shape == (B, T, H, 1)
    assert ((fw + kv - 1).abs() > 1e-6).all()


@pytest.mark.parametrize("kv_gate", [False, True])
@pytest.mark.parametrize("bias", [None, 0.0])
def test_add_starts_as_its_attention(bias, kv_gate):
    """Bit for bit, with a gradient of the gate that is not zero."""
    options = {"hidden_size": 8, "num_heads": 2, "window": 3, "num_kv_heads": 1}
    layer = HybridMemory(**options, mixer="add", gate_bias=bias, kv_gate=kv_gate).double()
    attention = HybridMemory(**options, blend="kv-only").double()
    attention.load_state_dict(layer.state_dict(), strict=False)
    x = normal(2, 9, 8)
    y, _ = layer(x)
    assert torch.equal(y, attention(x)[0])
    y.square().sum().backward()
    assert layer.mixer.gate_proj.weight.grad.any(dim=1).all()


@pytest.mark.parametrize("mixer", ["vector", "scalar", "add"])
def test_initial_biases_of_gates(mixer):
    layer = HybridMemory(8, 2, 3, mixer=mixer, gate_bias=-4.0, beta_bias=1.0)
    assert (layer.mixer.gate_proj.bias == -4).all() and (layer.fw.beta_proj.bias == 1).all()


def test_the_kv_gate_of_add_starts_at_1_for_any_bias():
    mixer = AddMixer(HEADS, gate_bias=2.0, kv_gate=True)
    fw, kv = mixer.gates(mixer.logits(normal(B, T, H * V).float()))
    assert (fw == 2).all() and (kv == 1).all() and kv.shape == (B, T, H, 1)
