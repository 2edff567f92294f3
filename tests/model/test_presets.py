from __future__ import annotations

import pytest
import torch

from hqlt.model import HQLTForCausalLM, preset
from hqlt.model.presets import PRESETS


def on_meta(config) -> HQLTForCausalLM:
    with torch.device("meta"):
        return HQLTForCausalLM(config)


@pytest.mark.parametrize(
    ("name", "mixer", "parameters"),
    [
        ("hqlt-340m", "sum", 374_067_200),
        ("hqlt-340m", "scalar", 374_460_416),
        ("hqlt-340m", "vector", 399_233_024),
        ("hqlt-1.3b", "sum", 1_365_087_232),
        ("hqlt-1.3b", "scalar", 1_366_660_096),
        ("hqlt-1.3b", "vector", 1_465_750_528),
    ],
)
def test_parameter_counts_match_the_paper(name, mixer, parameters):
    assert sum(p.numel() for p in on_meta(preset(name, mixer=mixer)).parameters()) == parameters


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds(name):
    model = on_meta(preset(name))
    assert len(model.model.layers) == model.config.num_hidden_layers


def test_the_baselines_have_one_memory():
    for size, hidden in (("340m", 1024), ("1.3b", 2048)):
        transformer, deltanet = preset(f"transformer-{size}"), preset(f"deltanet-{size}")
        assert set(transformer.kinds) == {"kv"}
        assert transformer.kv_window is None
        assert transformer.num_heads == hidden // 64
        assert transformer.rope_theta == 10_000.0
        assert set(deltanet.kinds) == {"fw"}
        assert deltanet.num_heads == hidden // 128
        assert (deltanet.beta_max, deltanet.conv_size) == (1.0, 0)


def test_blends_in_names():
    for size in ("340m", "1.3b"):
        assert preset(f"hqlt-{size}").blend == "synchronous"
        for blend in ("delayed-streaming", "delayed-chunk"):
            config = preset(f"hqlt-{size}-{blend}")
            assert (config.blend, config.mixer, config.window) == (blend, "vector", 64)


def test_tiny_is_tiny():
    model = HQLTForCausalLM(preset("tiny"))
    assert sum(p.numel() for p in model.parameters()) <= 3_000_000
    assert model(torch.randint(256, (1, 5))).logits.shape == (1, 5, 256)


def test_changes_override_the_preset():
    assert preset("tiny", window=16, hidden_size=96).window == 16
    assert preset("tiny", hidden_size=96).intermediate_size == 256


def test_unknown_name():
    with pytest.raises(ValueError, match=r"preset: expected one of 'hqlt-340m', .* did you mean 'hqlt-340m'"):
        preset("hqlt-340")
