"""Retention enabled in existing layers and in modules that contain layers."""

from __future__ import annotations

import copy
from dataclasses import fields

import pytest
import torch
from torch import nn

import hqlt
from hqlt.agent.memory_model import build_memory
from hqlt.cli.retention_options import RetentionOptions
from hqlt.memory import KVMemory
from hqlt.memory.kv import Surprise
from hqlt.registry import name_of, options_of
from tests.laws import close
from tests.layers import CHOICES, COMMON_OPTIONS, GROUPED, HYBRIDS, build_layer, tokens
from tests.toys.retention import KeyNorm

RETENTIONS = {
    "surprise": {"retention": "surprise", "kept": 3},
    "all else": {
        "retention": "surprise",
        "kept": 2,
        "score": "beta-error",
        "sinks": 1,
        "kept_positions": "clamped",
        "kept_norm": True,
        "kept_gate": -1.0,
    },
    "random": {"retention": "random", "kept": 2, "sinks": 2, "kept_positions": "none", "kept_alike": True},
    "sinks alone": {"retention": "recent", "sinks": 2},
    "one of a package": {"retention": name_of("retention", KeyNorm), "kept": 2, "order": 1.0},
}
CHANGED = {
    "plain": {},
    "grouped": {**GROUPED, **COMMON_OPTIONS, "partial_rotary_factor": 0.5},
    "scaled": CHOICES["synchronous-scaled"],
    "keeps already": {"retention": "value-norm", "kept": 4, "kept_norm": True, "kept_gate": 0.5, "sinks": 1},
}


def built(layer, window, **options):
    """A layer built anew with these options and loaded with the same weights; those that are new as they begin."""
    other = hqlt.HybridMemory(8, options.pop("num_heads", 2), window, **options).double()
    own = {name: weight for name, weight in layer.state_dict().items() if name in other.state_dict()}
    other.load_state_dict(own, strict=False)
    return other


@pytest.mark.parametrize("changed", CHANGED)
@pytest.mark.parametrize("retention", RETENTIONS)
def test_it_equals_a_layer_built_with_the_same_options(retention, changed):
    before = {name: CHANGED[changed][name] for name in CHANGED[changed] if name not in CHANGED["keeps already"]}
    layer = build_layer("", 4, **CHANGED[changed])
    switched = hqlt.with_retention(layer, window=3, **RETENTIONS[retention])
    expected = built(layer, 3, **before, **RETENTIONS[retention])
    assert hqlt.fingerprint(switched) == hqlt.fingerprint(expected)
    (y, state), (y_expected, expected_state) = switched(tokens(2, 9)), expected(tokens(2, 9))
    close((y, *state.leaves()), (y_expected, *expected_state.leaves()))
    for empty, of in zip(switched.init_state(2).leaves(), state.leaves(), strict=True):
        assert (empty.shape, empty.dtype) == (of.shape, of.dtype)
    close(switched(tokens(2, 1), state)[0], expected(tokens(2, 1), expected_state)[0])
    with pytest.raises(ValueError, match=r"state.* for this layer"):
        switched(tokens(2, 1), layer(tokens(2, 9))[1])


def test_all_options_of_retention_are_supported():
    later, options = options_of(KVMemory.with_retention), options_of(KVMemory)
    of_positions = {"rope_theta", "partial_rotary_factor", "rope_scaling"}
    assert later == {name: options[name] for name in options.keys() - of_positions}
    assert {*later, *options_of(Surprise), "retention", "window"} == {field.name for field in fields(RetentionOptions)}


@pytest.mark.parametrize("option", [{"kept_alike": True}, {"kept_positions": "none"}, {"kept_norm": True}])
def test_the_state_of_another_retention_is_rejected(option, tmp_path):
    one = hqlt.with_retention(build_layer("", 4), kept=2)
    hqlt.save_state(tmp_path / "state", one(tokens(1, 9))[1], one)
    with pytest.raises(ValueError, match="state"):
        hqlt.load_state(tmp_path / "state", hqlt.with_retention(one, kept=2, **option))


@pytest.mark.parametrize("blend", [*HYBRIDS, "kv-only"])
def test_recent_keeps_nothing(blend):
    layer = build_layer("", 4, blend=blend)
    same = hqlt.with_retention(layer, retention="recent")
    assert hqlt.fingerprint(same) == hqlt.fingerprint(layer)
    close(same(tokens(2, 9))[0], layer(tokens(2, 9))[0])
    there_and_back = hqlt.with_retention(hqlt.with_retention(layer, retention="random", kept=2), retention="recent")
    assert hqlt.fingerprint(there_and_back) == hqlt.fingerprint(layer)


@pytest.mark.parametrize("retention", ["surprise", "random"])
def test_keeping_everything_equals_a_longer_window(retention):
    layer = build_layer("", 4)
    all_kept = hqlt.with_retention(layer, retention=retention, window=2, kept=9)
    close(all_kept(tokens(2, 9))[0], hqlt.with_retention(layer, retention="recent", window=9)(tokens(2, 9))[0])


def test_the_copy_has_its_own_weights_and_the_same_mode():
    layer = build_layer("", 4, torch.bfloat16).eval()
    layer.requires_grad_(False)
    before = copy.deepcopy(layer.state_dict())
    switched = hqlt.with_retention(layer, kept=2, kept_norm=True)
    assert not any(part.training for part in switched.modules())
    assert {weight.dtype for weight in switched.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        for weight in switched.parameters():
            weight.zero_()
    assert all(weight.equal(before[name]) for name, weight in layer.state_dict().items())


def test_agents_and_layers_that_stay_unchanged():
    memory = build_memory("synchronous", hidden_size=8, window=4).double()
    switched = hqlt.with_retention(memory, window=2, kept=3)
    x, resets = tokens(2, 9), torch.zeros(2, 9, dtype=torch.bool)
    y, state = switched.sequence(x, switched.init_state(2), resets)
    assert [part.kv.kept.keys.shape[1] for part in state] == [3, 3]
    assert not y.equal(memory.sequence(x, memory.init_state(2), resets)[0])
    several = nn.ModuleList(
        [build_layer("", 4), build_layer("fw-only-delta"), build_layer("kv-only-full-options"), build_layer("kv-only")]
    )
    changed = hqlt.with_retention(several, retention="value-norm", window=3, kept=2)
    names = [hqlt.fingerprint(layer) for layer in several]
    kept = [hqlt.fingerprint(layer) == name for layer, name in zip(changed, names, strict=True)]
    assert kept == [False, True, True, False]


@pytest.mark.parametrize(
    ("layer", "options", "message"),
    [
        (nn.Linear(2, 2), {"kept": 1}, "model: expected at least one layer whose KV-memory .* no hqlt layer"),
        (build_layer("fw-only-delta"), {"kept": 1}, "got 1 without a KV-memory and 0 that attend to everything"),
        (build_layer("synchronous-full"), {"kept": 1}, r"got 0 without .* and 1 that attend to everything \(window"),
        (build_layer(""), {}, "kept: expected at least 1"),
        (build_layer(""), {"retention": "recent", "kept": 3}, "kept: expected an option .*'recent' uses none"),
        (build_layer(""), {"retention": "suprise", "kept": 3}, "retention: .* did you mean 'surprise'"),
        (build_layer(""), {"keep": 3}, "keep: expected an option .* did you mean 'kept'"),
        (build_layer(""), {"kept": 3, "window": 0}, "window: expected at least 1"),
        (build_layer(""), {"kept": 3, "sinks": -1}, "sinks: expected a number of entries, at least 0"),
        (build_layer("kv-only"), {"kept": 3}, "expected one that does not score by .* got 'surprise'"),
        (build_layer("", blend="delayed-chunk"), {"kept": 3}, "or a blend that writes a token when it arrives"),
        (build_layer("", fast_weights="linear"), {"kept": 3}, "'linear' writes without a prediction"),
    ],
)
def test_errors(layer, options, message):
    with pytest.raises(ValueError, match=message):
        hqlt.with_retention(layer, **options)
