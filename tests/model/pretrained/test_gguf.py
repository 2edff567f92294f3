"""GGUF files: fields become a config, tensors a model, and everything else is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hqlt.model.pretrained import config_of, from_transformers
from hqlt.model.pretrained.gguf import config_in, is_gguf, read_gguf, tensors_in
from tests.gguf_files import fields_of, head_dim, tensors_of, write_gguf
from tests.model.pretrained.conftest import LLAMA3, model_for

pytest.importorskip("gguf", reason="the extra `retrofit`")

TEXT = torch.randint(3, 37, (2, 40), generator=torch.Generator().manual_seed(1))
WIDE = {"hidden_size": 32, "intermediate_size": 64}  # quantization blocks hold 32 numbers
MODELS = {
    "llama": {"model_type": "llama", "num_key_value_heads": 2, **WIDE},
    "llama, all of it": {
        "model_type": "llama", "head_dim": 16, "num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True,
        "tie_word_embeddings": True, "rms_norm_eps": 1e-3, **WIDE,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0},
    },
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 1, "tie_word_embeddings": True, **WIDE},
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "num_key_value_heads": 2, **WIDE},
}  # fmt: skip
SCALED = {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}


def written(file, name, quantization=None, fields=None, tensors=None):
    """Write a model to a file; returns the model. `fields` and `tensors` override; None removes."""
    model = model_for(**MODELS[name])
    all_fields = fields_of(model) | ({f"llama.{key}": value for key, value in SCALED.items()} if "all" in name else {})
    all_fields, all_tensors = all_fields | (fields or {}), tensors_of(model) | (tensors or {})
    written = {key: value for key, value in all_fields.items() if value is not None}
    values = write_gguf(
        file, written, {key: value for key, value in all_tensors.items() if value is not None}, quantization
    )
    return model, values


def read(file):
    found = read_gguf(file)
    return found, config_in(found)


@pytest.mark.parametrize("name", MODELS)
def test_round_trip(tmp_path, name):
    theirs, _ = written(tmp_path / "m.gguf", name)
    found, config = read(tmp_path / "m.gguf")
    unsaid = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "head_dim": head_dim(theirs.config)}
    assert is_gguf(tmp_path / "m.gguf")
    assert config_of(config).to_dict() == config_of(theirs.config).to_dict() | unsaid
    tensors, expected = tensors_in(found, config), theirs.state_dict()
    assert set(expected) - set(tensors) == ({"lm_head.weight"} if config.tie_word_embeddings else set())
    assert all(torch.equal(tensor, expected[key]) for key, tensor in tensors.items())


@pytest.mark.parametrize("quantization", ["F16", "BF16", "Q8_0", "Q4_1", "Q5_0"])
def test_dequantization_equals_gguf(tmp_path, quantization):
    theirs, values = written(tmp_path / "m.gguf", "qwen3", quantization)
    found, config = read(tmp_path / "m.gguf")
    theirs.load_state_dict(tensors_in(found, config))
    assert f"of {quantization}" in found.quantizations()
    again = tensors_of(theirs)
    assert all(np.array_equal(again[name], value) for name, value in values.items())
    ours = from_transformers(theirs)
    torch.testing.assert_close(ours(TEXT).logits, theirs(TEXT).logits, rtol=0, atol=1e-4)


def test_the_frequencies_of_a_llama_3(tmp_path):
    """A file holds divisors of frequencies, from which the config is derived; other divisors are refused."""
    f = 500_000.0 ** (-torch.arange(0, 8, 2) / 8)
    kept = ((8192 * f / (2 * torch.pi) - 1) / 3).clamp(0, 1)
    assert 0 < kept[2] < 1  # one is interpolated
    divisors = (1 / (kept + (1 - kept) / 32)).numpy()
    base = {"llama.rope.freq_base": 500_000.0}
    written(tmp_path / "m.gguf", "llama", fields=base, tensors={"rope_freqs.weight": divisors})
    found, config = read(tmp_path / "m.gguf")
    assert config.rope_parameters == {**LLAMA3, "original_max_position_embeddings": 8192, "factor": 32.0} | {
        "rope_theta": 500_000.0
    }
    assert "rope_freqs.weight" not in tensors_in(found, config)
    written(tmp_path / "n.gguf", "llama", fields=base, tensors={"rope_freqs.weight": divisors[::-1].copy()})
    with pytest.raises(ValueError, match=r"rope_freqs\.weight: expected the divisors of a Llama 3, computed from"):
        read(tmp_path / "n.gguf")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"llama.expert_count": 8}, "llama.expert_count: expected 0, which is what our layers have, got 8"),
        ({"llama.attention.sliding_window": 7}, "llama.attention.sliding_window: expected no such field"),
        ({"llama.attention.causal": False}, "llama.attention.causal: expected True, which"),
        ({"llama.rope.dimension_count": 4}, "llama.rope.dimension_count: expected 8, which is what our layers have"),
        ({"llama.rope.scaling.type": "longrope"}, "longrope"),
        ({"llama.embedding_length": None}, "expected a model's sizes and embeddings, got KeyError"),
        ({"llama.feed_forward_length": [64, 32]}, "expected the fields of a llama, got .*intermediate_size"),
        ({"general.type": "adapter"}, "expected a complete model in one file, got type 'adapter'"),
        ({"split.count": 3}, "expected a complete model in one file, got 1 of 3"),
    ],
)
def test_unsupported_fields_are_refused(tmp_path, fields, message):
    written(tmp_path / "m.gguf", "llama", fields=fields)
    with pytest.raises(ValueError, match=message):
        config_of(read(tmp_path / "m.gguf")[1])


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"blk.0.ffn_gate_exps.weight": np.ones((4, 4), np.float32)}, "1 unknown, such as blk.0.ffn_gate_exps.weight"),
        ({"blk.1.attn_v.weight": None}, "1 missing, such as model.layers.1.self_attn.v_proj.weight"),
        ({"blk.0.attn_v.bias": np.ones(16, np.float32)}, "1 unknown, such as blk.0.attn_v.bias"),
        ({"blk.1.ffn_up.weight": np.ones((4, 4), np.float32)}, "1 with another shape, such as model.layers.1.mlp.up"),
    ],
)
def test_wrong_tensors_are_refused(tmp_path, tensors, message):
    written(tmp_path / "m.gguf", "llama", tensors=tensors)
    with pytest.raises(ValueError, match=message):
        tensors_in(*read(tmp_path / "m.gguf"))


def test_an_unsupported_quantization(tmp_path, monkeypatch):
    def dequantize(data, kind):
        raise NotImplementedError

    written(tmp_path / "m.gguf", "llama", "Q8_0")
    monkeypatch.setattr("gguf.dequantize", dequantize)
    with pytest.raises(ValueError, match="expected a quantization that the package gguf can dequantize, got"):
        tensors_in(*read(tmp_path / "m.gguf"))


def test_other_files(tmp_path):
    written(tmp_path / "whole.gguf", "llama")
    content = (tmp_path / "whole.gguf").read_bytes()
    for n in (30, len(content) // 2, len(content) - 100):
        (tmp_path / "cut.gguf").write_bytes(content[:n])
        with pytest.raises(ValueError, match="expected a complete GGUF file, got"):
            read_gguf(tmp_path / "cut.gguf")
    written(tmp_path / "other.gguf", "llama", fields={"general.architecture": "gemma"})
    with pytest.raises(ValueError, match=r"general\.architecture: expected one of 'llama', 'qwen2', 'qwen3', got 'gem"):
        read(tmp_path / "other.gguf")
    assert not is_gguf(tmp_path) and not is_gguf(tmp_path / "none")
