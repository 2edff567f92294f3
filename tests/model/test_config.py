from __future__ import annotations

import copy
import inspect
import pickle
import re

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import AutoConfig, PreTrainedModel

from hqlt.layer import HybridMemory, RMSNorm
from hqlt.model import HQLTConfig, HQLTForCausalLM


def test_fields_of_the_layer_have_its_names_and_defaults():
    config = HQLTConfig()
    for name, parameter in inspect.signature(HybridMemory).parameters.items():
        assert hasattr(config, name)
        if parameter.default not in (parameter.empty, None):  # the config chooses the mixer and the rule
            assert getattr(config, name) == parameter.default, name


@pytest.mark.parametrize(("hidden_size", "width"), [(1024, 2816), (2048, 5632), (96, 256), (97, 512)])
def test_width_of_the_mlp(hidden_size, width):
    assert HQLTConfig(hidden_size=hidden_size, num_heads=1, rope_theta=None).intermediate_size == width
    assert HQLTConfig(intermediate_size=64).intermediate_size == 64


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("windw", "window"), ("num_head", "num_heads"), ("hidden_sizes", "hidden_size"), ("layer_kind", "layer_kinds")],
)
def test_unknown_key_is_refused_with_a_suggestion(wrong, right):
    with pytest.raises(ValueError, match=f"unknown '{wrong}'; did you mean '{right}'"):
        HQLTConfig(**{wrong: 8})


def test_unknown_key_without_a_similar_field_lists_the_fields():
    with pytest.raises(ValueError, match=r"unknown 'temperature'; the fields are hidden_size, num_heads, window"):
        HQLTConfig(temperature=0.5)


def test_unknown_key_is_refused_when_loading(small, tmp_path):
    HQLTConfig(**small).save_pretrained(tmp_path)
    for load in (HQLTConfig.from_pretrained, AutoConfig.from_pretrained):
        assert load(tmp_path, window=5).window == 5
        with pytest.raises(ValueError, match="did you mean 'window'"):
            load(tmp_path, windw=5)
        with pytest.raises(ValueError, match="window: expected at least 1"):
            load(tmp_path, window=0)


def test_attributes_of_other_tools_are_kept(small, tmp_path):
    """Attributes set on a config or added to its file are kept; misspelled fields in the file are refused."""
    foreign = {
        "unsloth_version": "2026.1", "tokenizer_class": "PreTrainedTokenizerFast", "max_position_embeddings": 4096,
        "unk_token_id": 3, "task_specific_params": {"a": [1]}, "sep_token_id": 4, "decoder_start_token_id": 5,
    }  # fmt: skip
    config = HQLTConfig(**small)
    for name, value in foreign.items():
        setattr(config, name, value)
    config.save_pretrained(tmp_path)
    model = HQLTForCausalLM(AutoConfig.from_pretrained(tmp_path))
    model.save_pretrained(tmp_path / "again")
    for loaded in (HQLTConfig.from_pretrained(tmp_path / "again"), HQLTConfig.from_dict(config.to_dict())):
        assert {name: getattr(loaded, name) for name in foreign} == foreign
    assert HQLTConfig.from_pretrained(tmp_path, unsloth_version="2").unsloth_version == "2"
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace('"window"', '"windows"'))
    with pytest.raises(ValueError, match="unknown 'windows'; did you mean 'window'"):
        AutoConfig.from_pretrained(tmp_path)


def test_arguments_of_loaders_are_ignored(small, tmp_path):
    """All keyword arguments of transformers' loader, found in the source of the installed version."""
    load_model = PreTrainedModel.from_pretrained
    taken = {
        *re.findall(r'kwargs\.(?:pop|get)\(\s*"(\w+)"', inspect.getsource(load_model)),
        *inspect.signature(load_model).parameters,
        *inspect.signature(HfApi.hf_hub_download).parameters,
    }
    taken -= {"self", "config", "pretrained_model_name_or_path", "repo_id", "filename", "subfolder"}
    taken -= {"model_args", "kwargs", "_from_auto", "_from_pipeline", "output_loading_info"}
    assert {"device_map", "use_safetensors", "gguf_file", "tqdm_class"} <= taken
    HQLTConfig(**small).save_pretrained(tmp_path)
    given = {**dict.fromkeys(sorted(taken)), "local_files_only": True, "attn_implementation": "eager", "x_y_z": 1}
    for load in (HQLTConfig.from_pretrained, AutoConfig.from_pretrained):
        assert load(tmp_path, **given).window == 4


def test_round_trips(small, tmp_path):
    config = HQLTConfig(
        **{**small, "num_hidden_layers": 3}, layer_kinds=["fw", "kv", "hybrid"], eos_token_id=[1, 2],
        of_kind={"fw": {"num_heads": 4, "fast_weights": "linear"}, "kv": {"rope_theta": None, "block_norms": "both"}},
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    for other in (
        HQLTConfig(**config.to_dict()),
        HQLTConfig.from_dict(config.to_dict()),
        HQLTConfig.from_pretrained(tmp_path),
        AutoConfig.from_pretrained(tmp_path),
        AutoConfig.for_model(**config.to_diff_dict()),
        copy.deepcopy(config),
        pickle.loads(pickle.dumps(config)),
    ):
        assert isinstance(other, HQLTConfig)
        a, b = other.to_dict(), config.to_dict()
        a.pop("_name_or_path"), b.pop("_name_or_path")
        assert a == b


def test_keys_that_transformers_adds_are_accepted(small):
    config = HQLTConfig(
        **small, torch_dtype="bfloat16", attn_implementation="eager", num_labels=3, num_attention_heads=4
    )
    assert (config.num_heads, config.num_attention_heads, config.num_labels) == (4, 4, 3)
    assert HQLTForCausalLM(config).generation_config is not None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_heads": 3}, "num_heads: expected a positive number that divides hidden_size = 1024, got 3"),
        ({"window": 0}, "window: expected at least 1"),
        ({"window": None, "blend": "delayed-chunk"}, "window: expected a number of tokens"),
        ({"blend": "delayed-chunks"}, "did you mean 'delayed-chunk'"),
        ({"mixer": "vektor"}, "did you mean 'vector'"),
        ({"fast_weights": "gated"}, "fast_weights: expected one of .*'delta', .* got 'gated'"),
        ({"beta_max": 3.0}, r"beta_max: expected a number in \(0, 2\]"),
        ({"conv_size": -1}, "conv_size"),
        ({"conv_init": "identical"}, "conv_init: .* did you mean 'identity'"),
        ({"norm_eps": 0.0}, "norm_eps: expected a number above 0"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: expected at least 1, got 0"),
        ({"vocab_size": 0}, "vocab_size: expected at least 1"),
        ({"layer_kinds": ["kv"]}, "expected one entry for each of the 24 layers .* got 1"),
        ({"layer_kinds": ["kw"], "num_hidden_layers": 1}, "layer_kinds: .* got 'kw'"),
        ({"layer_kinds": ["kv"], "kv_window": 0, "num_hidden_layers": 1}, "window: expected at least 1"),
        ({"block_norms": "befor"}, "block_norms: expected one of 'before', 'after', 'both', got 'befor'"),
        ({"of_kind": {"fw": {}}}, "of_kind: expected one of 'hybrid', got 'fw'"),
        ({"of_kind": {"hybrid": {"num_head": 4}}}, r"of_kind\['hybrid'\]: .* got 'num_head'; did you mean 'num_heads'"),
        ({"of_kind": {"hybrid": {"hidden_size": 8}}}, r"of_kind\['hybrid'\]: expected one of .* got 'hidden_size'"),
        (
            {"of_kind": {"hybrid": {"mixer": "sum"}}, "gate_bias": 1.0},
            "gate_bias: expected an option that a layer uses",
        ),
    ],
)
def test_invalid_values_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        HQLTConfig(**fields)


def test_fields_of_one_kind_of_layer(small):
    own = {"fw": {"num_heads": 4, "fast_weights": "linear"}, "kv": {"rope_theta": None, "block_norms": "both"}}
    model = HQLTForCausalLM(HQLTConfig(**small, layer_kinds=["fw", "kv"], of_kind=own, conv_size=2))
    fw, kv = model.model.layers
    assert (fw.memory.num_heads, kv.memory.num_heads, fw.memory.conv.size, kv.memory.conv.size) == (4, 2, 2, 2)
    assert (type(fw.memory.fw).__name__, kv.memory.kv.positions) == ("LinearMemory", None)
    norms = [[name for name, part in block.named_children() if isinstance(part, RMSNorm)] for block in (fw, kv)]
    assert norms == [["memory_norm", "mlp_norm"], ["memory_norm", "memory_out_norm", "mlp_norm", "mlp_out_norm"]]


def test_wrong_types_are_refused_also_on_assignment():
    with pytest.raises(StrictDataclassFieldValidationError, match="window"):
        HQLTConfig(window="8")
    config = HQLTConfig()
    with pytest.raises(StrictDataclassFieldValidationError, match="num_heads"):
        config.num_heads = "8"


def test_integers_are_accepted_for_floats():
    assert HQLTConfig(beta_max=1, rope_theta=500).beta_max == 1
