"""Switching a language model to a retention that keeps entries beyond the window."""

from __future__ import annotations

import pytest
import torch

import hqlt
from hqlt import HQLTConfig, HQLTForCausalLM
from tests.language.conftest import KINDS, build
from tests.laws import close
from tests.toys.retention import KeyNorm

KEPT = {"retention": "random", "window": 3, "kept": 2, "sinks": 1, "kept_norm": True, "kept_gate": -1.0}
TOKENS = torch.arange(22).view(2, 11) * 7 % 256


@pytest.mark.parametrize("kind", {**KINDS, "transformer": {"layer_kinds": ["kv", "kv"], "kv_window": [None, 5]}})
def test_the_config_is_updated(kind, tmp_path):
    fields = {**KINDS, "transformer": {"layer_kinds": ["kv", "kv"], "kv_window": [None, 5]}}[kind]
    model = build(**fields)
    switched = hqlt.with_retention(model, **KEPT)
    rebuilt = HQLTForCausalLM(switched.config).double().eval()
    names = rebuilt.load_state_dict(model.state_dict(), strict=False)
    assert not names.unexpected_keys and all(".kv." in name for name in names.missing_keys)
    assert hqlt.fingerprint(rebuilt) == hqlt.fingerprint(switched) != hqlt.fingerprint(model)
    switched.save_pretrained(tmp_path)
    loaded = HQLTForCausalLM.from_pretrained(tmp_path)
    assert hqlt.fingerprint(loaded) == hqlt.fingerprint(switched)
    logits = [one(TOKENS).logits for one in (switched, rebuilt, loaded)]
    close(logits[1:], logits[:1] * 2)
    made = [one.generate(TOKENS, max_new_tokens=5, do_sample=False) for one in (switched, loaded)]
    assert made[0].equal(made[1])
    assert model.config.retention == "recent" and model.config.kept == 0


def test_fields_of_a_kind_and_of_a_registered_retention():
    fields = {"retention": "key-norm", "kept": 2, "options": {"order": 1.0}, "of_kind": {"hybrid": {"sinks": 1}}}
    model = build(**fields)
    assert hqlt.with_retention(model, retention="recent").config.to_diff_dict() == {
        **build().config.to_diff_dict(),
        "of_kind": {"hybrid": {}},
    }
    other = hqlt.with_retention(build(), retention="key-norm", kept=1, order=3.0)
    assert other.config.options == {"order": 3.0}
    kept = other.model.layers[0].memory.kv.retention
    assert isinstance(kept, KeyNorm) and kept.order == 3.0


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        ({"layer_kinds": ["kv", "kv"]}, {"kept": 2}, "2 that attend to everything"),
        ({"layer_kinds": ["kv", "hybrid"], "kv_window": 3}, {"kept": 2}, "or a blend that writes a token when it"),
        ({}, {"kept": 2, "order": 1}, "order: expected an option of the chosen parts"),
    ],
)
def test_invalid_options_are_refused(fields, options, message):
    with pytest.raises(ValueError, match=message):
        hqlt.with_retention(build(**fields), **options)


def test_layers_with_full_attention_need_no_retention():
    config = HQLTConfig(**{**KEPT, "layer_kinds": ["kv", "hybrid"], "num_hidden_layers": 2})
    assert config.layer_options(0) | {"window": None, "retention": "recent"} == config.layer_options(0)
    with pytest.raises(ValueError, match="sinks: expected an option that a layer uses"):
        HQLTConfig(layer_kinds=["kv"], num_hidden_layers=1, sinks=2)
