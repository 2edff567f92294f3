"""Settings of a retrofit: options of the layers, and the number of updates."""

from __future__ import annotations

import dataclasses

import pytest

from hqlt.train.retrofit.settings import RetrofitSettings, Stage

DEFAULTS = {"window": 64, "sinks": 4, "retention": "recent", "kept": 0}


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
def test_default_options_of_the_layers(rule, options, expected):
    settings = RetrofitSettings(rule=rule, options=options)
    assert settings.layer_options() == {**DEFAULTS, "rule": rule, **expected}


def test_number_of_updates():
    settings = RetrofitSettings(fit=Stage(tokens=4097), distill=Stage(), tune=Stage(tokens=1, length=100))
    assert [(name, stage.steps) for name, stage in settings.stages] == [("fit", 2), ("tune", 1)]
    assert settings.steps == 3
    assert dataclasses.replace(settings, rule="none").steps == 1
