"""Before training, a retrofitted model equals its teacher within window and sinks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import hqlt
from hqlt import HQLTConfig, HQLTForCausalLM
from hqlt.model.pretrained import from_transformers
from hqlt.model.pretrained.retrofit import config_for, retrofitted
from tests.model.pretrained.conftest import MODELS, model_for

WINDOW, SINKS, LENGTH = 5, 2, 24


@pytest.fixture(params=["llama", "llama, all of it", "qwen3"])
def teacher(request):
    return nn.Module.double(from_transformers(model_for(**MODELS[request.param])))


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens, use_cache=False).logits


@pytest.mark.parametrize("rule", ["delta", "gated-delta", "linear", "none"])
@pytest.mark.parametrize("full", [(), (1,)])
def test_equals_the_teacher_within_the_window_and_windowed_attention_beyond(teacher, rule, full):
    tokens = torch.randint(37, (2, LENGTH))
    config = config_for(teacher.config, full=full, window=WINDOW, sinks=SINKS, rule=rule)
    windowed = config_for(teacher.config, full=full, window=WINDOW, sinks=SINKS, rule="none")
    student, alone = (nn.Module.double(retrofitted(teacher, config)) for config in (config, windowed))
    expected, now, window = (logits(model, tokens) for model in (teacher, student, alone))
    visible = WINDOW + SINKS
    torch.testing.assert_close(now[:, :visible], expected[:, :visible], rtol=0, atol=1e-10)
    torch.testing.assert_close(now, window, rtol=0, atol=1e-10)
    assert (now[:, visible:] - expected[:, visible:]).abs().amax(dim=-1).min() > 1e-3


@pytest.mark.parametrize("options", [{}, {"feature_map": "learned"}, {"rule": "linear", "feature_map": "hedgehog"}])
def test_only_new_parameters_are_missing_in_the_teacher(teacher, options):
    config = config_for(teacher.config, full=(0,), window=WINDOW, **options)
    missing, unknown = HQLTForCausalLM(config).load_state_dict(teacher.state_dict(), strict=False)
    assert unknown == []
    parts = {name.split(".memory.")[1] for name in missing}
    assert {name.split(".")[2] for name in missing} == {"1"}
    new = {"mixer.gate_proj.weight", "o_norm.weight"}
    new |= {"fw.beta_proj.weight"} if "rule" not in options else set()
    new |= {"fw.feature_map.q", "fw.feature_map.k"} if options else set()
    assert parts == new
    student = retrofitted(teacher, config)
    assert {name for name, parameter in student.named_parameters() if parameter.requires_grad} == set(missing)


def test_shares_the_teachers_tensors(teacher):
    theirs = dict(teacher.named_parameters())
    for name, parameter in retrofitted(teacher, config_for(teacher.config, window=WINDOW)).named_parameters():
        if name in theirs:
            assert parameter.data_ptr() == theirs[name].data_ptr()
            assert parameter is not theirs[name]


def test_kept_entries_and_a_saved_model(tmp_path, teacher):
    config = config_for(teacher.config, full=(0,), window=WINDOW, retention="value-norm", kept=3, head_norm=False)
    student = retrofitted(teacher, config)
    student.save_pretrained(tmp_path)
    loaded = HQLTForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    tokens = torch.randint(37, (2, LENGTH))
    torch.testing.assert_close(logits(loaded, tokens), logits(nn.Module.double(student), tokens))
    assert loaded.model.layers[1].memory.kv.kept == 4 + 3
    assert loaded.model.layers[0].memory.blend.window is None


def small(**changes):
    return HQLTConfig(**{"hidden_size": 16, "num_heads": 2, "num_hidden_layers": 2, "vocab_size": 37} | changes)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ({"layer_kinds": ["kv", "hybrid"]}, {}, "model: expected only kv layers.*got also hybrid layers"),
        ({}, {}, "model: expected only kv layers"),
        ({"layer_kinds": ["kv", "kv"], "kv_window": 8}, {}, r"model: expected layers with full attention.*got 8"),
        ({"layer_kinds": ["kv", "kv"]}, {"full": (2,)}, r"full: expected indices of layers from 0 to 1, got \[2\]"),
        ({"layer_kinds": ["kv", "kv"]}, {"full": (0, 1)}, "full: expected fewer than all 2 layers"),
        ({"layer_kinds": ["kv", "kv"]}, {"window": 0}, "window: expected at least 1"),
        ({"layer_kinds": ["kv", "kv"]}, {"rule": "dleta"}, "fast_weights.*delta"),
        ({"layer_kinds": ["kv", "kv"]}, {"rule": "none", "feature_map": "learned"}, "feature_map"),
        ({"layer_kinds": ["kv", "kv"]}, {"rule": "none", "retention": "surprise", "kept": 4}, "retention: expected"),
    ],
)
def test_refused(config, options, message):
    with pytest.raises(ValueError, match=message):
        config_for(small(**config), **options)


def test_options_of_kv_layers_become_those_of_hybrid_ones():
    config = small(layer_kinds=["kv", "kv"], of_kind={"kv": {"num_heads": 4, "rope_theta": 500.0}})
    for full in ((), (0,)):
        changed = config_for(config, full=full)
        assert [changed.layer_options(layer)["num_heads"] for layer in range(2)] == [4, 4]
        assert changed.layer_options(1)["rope_theta"] == 500.0
    assert hqlt.HQLTForCausalLM(changed).model.layers[1].memory.fw is not None
