from __future__ import annotations

import pytest
import torch

from hqlt.blend import Reads, ScalarMixer, SumMixer, VectorMixer
from tests.laws import close, normal

B, T, H, V = 2, 3, 2, 4
MIXERS = {"vector": VectorMixer(H * V, H), "scalar": ScalarMixer(H * V, H), "sum": SumMixer()}
for mixer in MIXERS.values():
    for weight in mixer.double().parameters():
        weight.data = normal(*weight.shape)


@pytest.mark.parametrize("mixer", MIXERS.values(), ids=MIXERS)
def test_mix_is_gates_times_reads(mixer):
    x, reads = normal(B, T, H * V), Reads(normal(B, T, H, V, seed=1), normal(B, T, H, V, seed=2))
    fw, kv = mixer.gates(mixer.logits(x))
    close(mixer(mixer.logits(x), reads), fw * reads.fw + kv * reads.kv)


def test_vector_gates_sum_to_one_and_gamma_weighs_fw():
    mixer = VectorMixer(H * V, H).double()
    fw, kv = mixer.gates(mixer.logits(normal(B, T, H * V)))
    close(fw + kv, torch.ones_like(fw))
    with torch.no_grad():
        mixer.gate_proj.weight.fill_(100)
    fw, _ = mixer.gates(mixer.logits(torch.ones(B, T, H * V, dtype=torch.float64)))
    close(fw, torch.ones_like(fw))


def test_scalar_gates_are_independent_and_one_for_each_head():
    fw, kv = MIXERS["scalar"].gates(MIXERS["scalar"].logits(normal(B, T, H * V)))
    assert fw.shape == kv.shape == (B, T, H, 1)
    assert ((fw + kv - 1).abs() > 1e-6).all()
