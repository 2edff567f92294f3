"""What a run is made of, from its options."""

from __future__ import annotations

import dataclasses

import pytest

from hqlt.train.retrofit.settings import RetrofitSettings, Stage

GIVEN = {"window": 64, "sinks": 4, "retention": "recent", "kept": 0}


@pytest.mark.parametrize(
    ("rule", "options", "expected"),
    [
        ("delta", {}, {"feature_map": "learned", "beta_bias": -6.0, "kv_gate": True}),
        ("linear", {"feature_map": "hedgehog"}, {"feature_map": "hedgehog", "kv_gate": True}),
        ("retnet", {"kv_gate": False}, {"kv_gate": False}),
        ("none", {}, {}),
        ("none", {"kept_positions": "clamped"}, {"kept_positions": "clamped"}),
    ],
)
def test_layers_begin_with_what_helps_unless_told_otherwise(rule, options, expected):
    settings = RetrofitSettings(rule=rule, options=options)
    assert settings.layer_options() == {**GIVEN, "rule": rule, **expected}


def test_a_stage_takes_as_many_updates_as_its_tokens_need():
    settings = RetrofitSettings(fit=Stage(tokens=4097), distill=Stage(), tune=Stage(tokens=1, length=100))
    assert [(name, stage.steps) for name, stage in settings.stages] == [("fit", 2), ("tune", 1)]
    assert settings.steps == 3
    assert dataclasses.replace(settings, rule="none").steps == 1
