"""Models of transformers, converted and back: the same logits, the same text, the same tensors."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, GenerationConfig

from hqlt.memory.rotary import Rotary
from hqlt.model import HQLTConfig
from hqlt.model.pretrained import config_as, config_of, from_transformers, to_transformers
from tests.model.pretrained.conftest import LINEAR, MODELS, config_for, model_for

TEXT = torch.randint(3, 37, (2, 40), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(TEXT)
MASK[0, :9] = 0  # longer than any window


@pytest.fixture(params=MODELS)
def pair(request):
    theirs = model_for(**MODELS[request.param])
    return theirs, from_transformers(theirs)


@pytest.mark.parametrize("mask", [None, MASK], ids=["", "left-padded"])
def test_logits(pair, mask):
    expected, logits = logits_of(pair, mask)
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-4 * expected.std().item())
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("mask", [None, MASK], ids=["", "left-padded"])
def test_logits_in_float64(pair, mask, monkeypatch):
    """Their norms and angles are float32, whatever the model: with both in float64, nothing differs."""
    theirs, ours = (model.double() for model in pair)
    config = ours.config
    rotary = Rotary.of(config.rope_theta, config.partial_rotary_factor, config.rope_scaling)

    def angles(x: Tensor, position_ids: Tensor) -> tuple[Tensor, ...]:
        tables = rotary.table(TEXT.shape[1], theirs.model.layers[0].self_attn.head_dim, x.device, x.dtype)
        return tuple(table[:, 0].repeat(1, 2)[position_ids] for table in tables)

    monkeypatch.setattr(theirs.model.rotary_emb, "forward", angles)
    for norm in theirs.modules():
        if hasattr(norm, "variance_epsilon"):
            monkeypatch.setattr(norm, "forward", partial(F.rms_norm, normalized_shape=norm.weight.shape,
                                                         weight=norm.weight, eps=norm.variance_epsilon))  # fmt: skip
    expected, logits = logits_of((theirs, ours), mask)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12 * expected.std().item())


def logits_of(pair, mask) -> list[Tensor]:
    """Each model's, at the tokens that are no padding."""
    read = torch.ones_like(TEXT) if mask is None else mask
    with torch.no_grad():
        return [model(TEXT, attention_mask=mask).logits[read.bool()] for model in pair]


@pytest.mark.parametrize("mask", [None, MASK], ids=["", "left-padded"])
@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "whole texts"])
def test_greedy_text(pair, use_cache, mask):
    options = {"attention_mask": mask, "use_cache": use_cache, "max_new_tokens": 12, "do_sample": False}
    expected, text = (model.generate(TEXT, **options) for model in pair)
    assert torch.equal(text, expected) and len(set(text[:, TEXT.shape[1] :].flatten().tolist())) > 3


def test_logits_in_two_calls(pair):
    theirs, ours = pair
    expected = theirs(TEXT).logits[:, 17:]
    first = ours(TEXT[:, :17])
    logits = ours(TEXT[:, 17:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-4 * expected.std().item())


def test_and_back(pair):
    theirs, ours = pair
    again = to_transformers(ours, theirs.config.model_type)
    assert type(again) is type(theirs)
    assert again.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in theirs.state_dict().items())
    assert torch.equal(again(TEXT).logits, theirs(TEXT).logits)
    told, told_again = theirs.config.to_dict(), again.config.to_dict()
    ignored = {"dtype", "architectures", "max_window_layers"}  # saved with a model, or of no effect beside layer_types
    assert {name: told_again[name] for name in told if name not in ignored} == {
        name: value for name, value in told.items() if name not in ignored
    }


def test_every_tensor_is_moved_none_copied(pair):
    theirs, ours = pair
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    assert {p.data_ptr() for p in ours.parameters()} == {p.data_ptr() for p in theirs.parameters()}


def test_the_config_survives_its_file(pair, tmp_path):
    _, ours = pair
    ours.config.save_pretrained(tmp_path)
    assert HQLTConfig.from_pretrained(tmp_path).to_dict() == ours.config.to_dict()


def test_what_goes_along():
    theirs = model_for(model_type="llama").to(torch.bfloat16).train()
    theirs.generation_config = GenerationConfig(eos_token_id=[2, 5], temperature=0.3, do_sample=True)
    ours = from_transformers(theirs)
    again = to_transformers(ours, "llama")
    for model in (ours, again):
        assert model.dtype == torch.bfloat16 and model.training
        assert (model.generation_config.eos_token_id, model.generation_config.temperature) == ([2, 5], 0.3)
        assert model.config.max_position_embeddings == 128 and model.config.pad_token_id == 0
    assert ours.generation_config is not theirs.generation_config


def test_configs_of_older_versions():
    """rope_theta and rope_scaling, beside each other, and `type` for rope_type; what is missing has its default."""
    told = config_for(model_type="llama").to_dict() | {
        "rope_theta": 500.0,
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "num_key_value_heads": None,
    }
    del told["rope_parameters"], told["head_dim"], told["attention_bias"]
    config = config_of(AutoConfig.for_model(**told))
    assert (config.rope_theta, config.rope_scaling) == (500.0, {"rope_type": "linear", "factor": 2.0})
    assert (config.num_kv_heads, config.head_dim, config.qkv_bias) == (4, 4, False)
    windows = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}
    assert config_of(config_for(model_type="qwen2", **windows)).kv_window is None  # for layers above the last
    yarn = {"rope_type": "yarn", "factor": 8.0}
    config = config_of(config_for(model_type="llama", rope_parameters=yarn))
    assert config.rope_scaling == {**yarn, "original_max_position_embeddings": 128}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma"}, "model_type: expected one of 'llama', 'qwen2', 'qwen3', 'mistral', got 'gemma'"),
        ({"hidden_act": "gelu"}, "hidden_act: expected 'silu', which is what our layers have, got 'gelu'"),
        ({"rope_parameters": {**LINEAR, "rope_type": "dynamic"}}, "got 'dynamic': its frequencies change"),
        ({"rope_parameters": {**LINEAR, "partial_rotary_factor": 0.5}}, "rope_parameters: expected .*0.5"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config: expected weights that are plain"),
        ({"model_type": "qwen2", "layer_types": ["full_attention", "chunked_attention"]}, "layer_types: expected"),
    ],
)  # fmt: skip
def test_what_our_layers_do_not_compute_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config_of(config_for(**{"model_type": "llama", **changes}))


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("gemma", {}, "architecture: expected one of 'llama', 'qwen2', 'qwen3', 'mistral', got 'gemma'"),
        ("llama", {"layer_kinds": ["kv", "hybrid"]}, "layer_kinds: expected only 'kv', because a llama"),
        ("llama", {"rope_theta": None}, "rope_theta: expected 10000.0, which is what a llama has, got None"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor: expected 1.0, which"),
        ("llama", {"conv_size": 4}, "conv_size: expected 0, which is what a llama has, got 4"),
        ("llama", {"output_gate": True}, "output_gate: expected False, which is what a llama has, got True"),
        ("llama", {"qkv_bias": True}, "qkv_bias: expected False, which is what a llama has, got True"),
        ("llama", {"qk_norm": "head"}, "qk_norm: expected None, which is what a llama has, got 'head'"),
        ("llama", {"kv_window": 7}, "kv_window: expected None, which is what a llama has, got 7"),
        ("mistral", {"o_bias": True}, "o_bias: expected False, which is what a mistral has, got True"),
        ("mistral", {"kv_window": [3, None]}, "kv_window: expected 3, which is what a mistral has, got"),
        ("qwen2", {}, "qkv_bias: expected True, which is what a qwen2 has, got False"),
        ("qwen3", {"qk_norm": "full"}, "qk_norm: expected 'head', which is what a qwen3 has, got 'full'"),
        ("qwen3", {"qk_norm": "head", "kv_window": [3, 4]}, r"kv_window: expected 3, .* got \[3, 4\]"),
    ],
)  # fmt: skip
def test_what_an_architecture_does_not_have_is_refused(architecture, changes, message):
    sizes = {"hidden_size": 16, "num_heads": 4, "num_hidden_layers": 2, "vocab_size": 37}
    with pytest.raises(ValueError, match=message):
        config_as(HQLTConfig(**{**sizes, "layer_kinds": ["kv", "kv"], **changes}), architecture)


def test_a_model_of_ours_becomes_each():
    """With the fields that each has always, a model that was made here is theirs; the defaults are a Llama's."""
    sizes = {"hidden_size": 16, "num_heads": 4, "num_hidden_layers": 2, "layer_kinds": ["kv", "kv"], "vocab_size": 37}
    for architecture, fields in {
        "llama": {},
        "qwen2": {"qkv_bias": True, "kv_window": [None, 3]},
        "qwen3": {"qk_norm": "head", "num_kv_heads": 2, "kv_window": 4},
        "mistral": {"kv_window": 4, "head_dim": 6},
    }.items():
        config = HQLTConfig(**sizes, **fields)
        again = config_of(config_as(config, architecture))
        assert {name: getattr(again, name) for name in fields} == fields, architecture
