"""Toy classes of another package, one file each, satisfy every law in combination with the built-in ones."""

from __future__ import annotations

import json

import pytest
import torch

import hqlt
from hqlt import HQLTConfig, HQLTForCausalLM
from tests.laws import Laws, close
from tests.layers import HYBRIDS, MIXERS, RULES, as_memory, build_layer, tokens
from tests.toys.blend import OneBehind
from tests.toys.mixer import Contrast
from tests.toys.retention import KeyNorm
from tests.toys.rule import TwoSpeeds

CLASSES = {"fast_weights": TwoSpeeds, "mixer": Contrast, "blend": OneBehind, "retention": KeyNorm}

COMBINATIONS = {
    **{f"{blend} × two-speeds": {"blend": blend, "fast_weights": "two-speeds"} for blend in (*HYBRIDS, "fw-only")},
    "own gates × two-speeds": {"blend": "delayed-streaming", "write_gates": "own", "fast_weights": "two-speeds"},
    **{f"one-behind × {rule}": {"blend": "one-behind", "fast_weights": rule} for rule in (*RULES, "two-speeds")},
    **{f"{blend} × contrast": {"blend": blend, "mixer": "contrast", "strength": 2.0} for blend in HYBRIDS},
    **{f"one-behind × {mixer}": {"blend": "one-behind", "mixer": mixer} for mixer in (*MIXERS, "add")},
    **{f"{blend} × key-norm": {"blend": blend, "retention": "key-norm", "kept": 2} for blend in (*HYBRIDS, "kv-only")},
    "all four, with every option": {
        "blend": "one-behind", "mixer": "contrast", "fast_weights": "two-speeds", "slowest": 0.9, "conv_size": 3,
        "retention": "key-norm", "kept": 3, "order": 1.0,
        "output_gate": True, "num_heads": 4, "num_kv_heads": 2, "head_dim": 4, "qk_norm": "head",
    },
}  # fmt: skip


class TestLaws(Laws):
    longest = 12

    @pytest.fixture(params=COMBINATIONS)
    def build(self, request):
        return lambda window: as_memory(build_layer("", window, **COMBINATIONS[request.param]))


OPTIONS = {"blend": "one-behind", "mixer": "contrast", "fast_weights": "two-speeds", "retention": "key-norm"}
SMALL = {"hidden_size": 16, "num_heads": 2, "window": 3, "num_hidden_layers": 2, "vocab_size": 11}


def test_configs_models_and_files(tmp_path):
    config = HQLTConfig(**SMALL, **OPTIONS, kept=2, options={"slowest": 0.75, "strength": 0.5, "order": 1.0})
    model = HQLTForCausalLM(config).double()
    memory = model.model.layers[0].memory
    assert (memory.fw.slowest, memory.mixer.strength, memory.kv.retention.order, memory.kv.kept) == (0.75, 0.5, 1.0, 2)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["options"] == {
        "slowest": 0.75,
        "strength": 0.5,
        "order": 1.0,
    }
    again = HQLTForCausalLM.from_pretrained(tmp_path)
    text = torch.randint(1, 11, (2, 9))
    close(again(text).logits, model(text).logits)
    continued = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(text, **continued), model.generate(text, use_cache=False, **continued))


def test_a_state_is_saved_and_loaded(tmp_path):
    layer = build_layer("", 3, **OPTIONS, kept=2)
    _, state = layer(tokens(2, 7))
    assert {"kv.gates.decay", "kv.gates.strength", "fw.fading", "fw.lasting", "kv.kept.scores"} <= set(
        state.named_leaves()
    )
    hqlt.save_state(tmp_path / "state.safetensors", state, layer)
    loaded = hqlt.load_state(tmp_path / "state.safetensors", layer)
    assert all(map(torch.equal, loaded.leaves(), state.leaves()))


def test_unused_options_are_rejected_with_the_nearest_name():
    with pytest.raises(ValueError, match=r"slowness: .*fast_weights='two-speeds' uses slowest.*did you mean 'slowest'"):
        build_layer("", 3, **OPTIONS, kept=2, slowness=0.1)
    with pytest.raises(ValueError, match="slowest: expected an option that a layer uses"):
        HQLTConfig(**SMALL, options={"slowest": 0.5})


def test_names_select_classes():
    layer = build_layer("", 3, **OPTIONS, kept=2)
    assert [type(part) for part in (layer.fw, layer.mixer, layer.blend, layer.kv.retention)] == list(CLASSES.values())


def test_taken_names_are_rejected():
    with pytest.raises(ValueError, match="name: expected a name that no rule has, got 'delta'"):
        hqlt.register("rule", "delta")(TwoSpeeds)
    with pytest.raises(ValueError, match=r"kind: expected one of 'rule', .* got 'rules'; did you mean 'rule'"):
        hqlt.register("rules", "two-speeds")
