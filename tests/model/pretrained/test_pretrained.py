"""Models of transformers converted there and back: same logits, same text, same tensors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig

from hqlt.memory.rotary import Rotary
from hqlt.model import HQLTConfig
from hqlt.model.pretrained import config_as, config_of, from_transformers, our_names, to_transformers
from tests.float64 import in_float64
from tests.model.pretrained.conftest import LINEAR, MIXED, MODELS, config_for, model_for

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
    """transformers computes norms, recurrences and angles in float32; with all of them in float64, logits are equal."""
    theirs, ours = (model.double() for model in pair)
    in_float64(theirs.config.model_type.removesuffix("_text"), monkeypatch)
    config = ours.config
    rotary = Rotary.of(config.rope_theta, config.partial_rotary_factor, config.rope_scaling)

    def angles(x: Tensor, position_ids: Tensor) -> tuple[Tensor, ...]:
        width = config.head_dim or config.hidden_size // config.num_heads
        tables = rotary.table(TEXT.shape[1], width, x.device, x.dtype)
        positions = position_ids[0] if position_ids.dim() == 3 else position_ids  # of time, height and width
        return tuple(table[:, 0].repeat(1, 2)[positions] for table in tables)

    if rotary is not None:
        monkeypatch.setattr(theirs.model.rotary_emb, "forward", angles)
    expected, logits = logits_of((theirs, ours), mask)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12 * expected.std().item())


def logits_of(pair, mask) -> list[Tensor]:
    """The logits of both models, except at padding."""
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


def test_conversion_back(pair):
    theirs, ours = pair
    again = to_transformers(ours, theirs.config.model_type)
    assert type(again) is type(theirs)
    assert again.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in theirs.state_dict().items())
    assert torch.equal(again(TEXT).logits, theirs(TEXT).logits)
    config, config_again = theirs.config.to_dict(), again.config.to_dict()
    ignored = {"dtype", "architectures", "max_window_layers"}  # added on saving, or without effect given layer_types
    assert {name: config_again[name] for name in config if name not in ignored} == {
        name: value for name, value in config.items() if name not in ignored
    }


def test_tensors_are_shared(pair):
    """Except packed ones."""
    theirs, ours = pair
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    held = {p.data_ptr() for p in ours.parameters()}
    for name, p in theirs.named_parameters():
        names, _ = our_names(name, ours.config, theirs.config.model_type)
        assert len(names) > 1 or p.data_ptr() in held, name
    if set(ours.config.kinds) == {"kv"}:
        assert {p.data_ptr() for p in theirs.parameters()} == held


def test_the_config_survives_its_file(pair, tmp_path):
    _, ours = pair
    ours.config.save_pretrained(tmp_path)
    assert HQLTConfig.from_pretrained(tmp_path).to_dict() == ours.config.to_dict()


def test_generation_config_and_mode_are_kept():
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
    """Separate rope_theta and rope_scaling, `type` instead of rope_type, and defaults for missing fields."""
    older = config_for(model_type="llama").to_dict() | {
        "rope_theta": 500.0,
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "num_key_value_heads": None,
    }
    del older["rope_parameters"], older["head_dim"], older["attention_bias"]
    config = config_of(AutoConfig.for_model(**older))
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
        ({"model_type": "gemma"}, "model_type: expected one of 'llama', 'qwen2', .*'olmo_hybrid', got 'gemma'"),
        ({"hidden_act": "gelu"}, "hidden_act: expected 'silu', which is what our layers have, got 'gelu'"),
        ({"rope_parameters": {**LINEAR, "rope_type": "dynamic"}}, "got 'dynamic': its frequencies change"),
        ({"rope_parameters": {**LINEAR, "partial_rotary_factor": 0.5}}, "rope_parameters: expected .*0.5"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config: expected unquantized weights"),
        ({"model_type": "qwen2", "layer_types": ["full_attention", "chunked_attention"]}, "layer_types: expected"),
        ({"model_type": "qwen3", "layer_types": ["full_attention", "linear_attention"]}, "layer_types: expected"),
        ({"model_type": "qwen3_next", **MIXED}, "num_experts: expected 0, which is what our layers have, got 512"),
        ({"model_type": "qwen3_next", **MIXED, "num_experts": 0, "attention_bias": True}, "attention_bias: expected F"),
        ({"model_type": "qwen3_5_text", **MIXED, "linear_num_value_heads": 3}, "num_value_heads: expected a multiple"),
        ({"model_type": "olmo_hybrid", **MIXED, "hidden_act": "gelu"}, "hidden_act: expected 'silu', which"),
    ],
)  # fmt: skip
def test_unsupported_configs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config_of(config_for(**{"model_type": "llama", **changes}))


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("gemma", {}, "architecture: expected one of 'llama', 'qwen2', .*'olmo_hybrid', got 'gemma'"),
        ("llama", {"layer_kinds": ["kv", "hybrid"]}, "layer_kinds: expected only 'kv', because a llama"),
        ("llama", {"rope_theta": None}, "rope_theta: expected 10000.0, which is what a llama has, got None"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor: expected 1.0, which"),
        ("llama", {"conv_size": 4}, "conv_size: expected 0, which is what a llama has, got 4"),
        ("llama", {"output_gate": True}, "output_gate: expected False, which is what a llama has, got 'silu'"),
        ("llama", {"qkv_bias": True}, "qkv_bias: expected False, which is what a llama has, got True"),
        ("llama", {"qk_norm": "head"}, "qk_norm: expected None, which is what a llama has, got 'head'"),
        ("llama", {"kv_window": 7}, "kv_window: expected None, which is what a llama has, got 7"),
        ("mistral", {"o_bias": True}, "o_bias: expected False, which is what a mistral has, got True"),
        ("mistral", {"kv_window": [3, None]}, "kv_window: expected 3, which is what a mistral has, got"),
        ("qwen2", {}, "qkv_bias: expected True, which is what a qwen2 has, got False"),
        ("qwen3", {"qk_norm": "full"}, "qk_norm: expected 'head', which is what a qwen3 has, got 'full'"),
        ("qwen3", {"qk_norm": "head", "kv_window": [3, 4]}, r"kv_window: expected 3, .* got \[3, 4\]"),
        ("qwen3", {"layer_kinds": ["kv", "fw"]}, "layer_kinds: expected only 'kv', because a qwen3"),
        ("olmo_hybrid", {}, "layer_kinds: expected 'kv' and 'fw', because a olmo_hybrid is attention and linear"),
        ("olmo_hybrid", {"layer_kinds": ["fw", "kv"]}, "fw.norm_eps: expected 1e-05, which is what a olmo"),
        ("olmo_hybrid", {"layer_kinds": ["kv", "fw"]}, "qk_norm: expected 'full', which is what a olmo"),
    ],
)  # fmt: skip
def test_models_that_an_architecture_cannot_express_are_refused(architecture, changes, message):
    sizes = {"hidden_size": 16, "num_heads": 4, "num_hidden_layers": 2, "vocab_size": 37}
    with pytest.raises(ValueError, match=message):
        config_as(HQLTConfig(**{**sizes, "layer_kinds": ["kv", "kv"], **changes}), architecture)


def test_a_model_trained_from_scratch_converts_to_each_architecture():
    """A model with an architecture's fixed fields converts to it; those of a Llama are the defaults."""
    sizes = {"hidden_size": 16, "num_heads": 4, "num_hidden_layers": 2, "layer_kinds": ["kv", "kv"], "vocab_size": 37}
    of_fw = {
        "num_heads": 4, "num_kv_heads": None, "head_dim": 6, "conv_size": 4, "output_gate": "silu", "norm_eps": 1e-5,
        "qkv_bias": False, "o_bias": False, "qk_norm": None, "block_norms": "before",
    }  # fmt: skip
    for architecture, fields in {
        "llama": {},
        "qwen2": {"qkv_bias": True, "kv_window": [None, 3]},
        "qwen3": {"qk_norm": "head", "num_kv_heads": 2, "kv_window": 4},
        "mistral": {"kv_window": 4, "head_dim": 6},
        "olmo_hybrid": {
            "layer_kinds": ["fw", "kv"],
            "fast_weights": "gated-delta",
            "qk_norm": "full",
            "block_norms": "after",
            "of_kind": {"fw": of_fw},
        },
    }.items():
        config = HQLTConfig(**{**sizes, **fields})
        again = config_of(config_as(config, architecture))
        assert {name: getattr(again, name) for name in fields} == fields, architecture
