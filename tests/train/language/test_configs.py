"""The included configs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

import hqlt
from hqlt.data import prepare
from hqlt.model import HQLTForCausalLM, preset
from hqlt.train.language import LanguageTrainer, TrainSettings
from hqlt.train.language.ranks import Ranks

CONFIGS = Path(hqlt.__file__).parent / "configs"


@pytest.mark.parametrize("size", ["340m", "1.3b"])
def test_the_recipe_of_the_paper(size):
    settings = TrainSettings(**yaml.safe_load((CONFIGS / f"hqlt-{size}.yaml").read_text()))
    assert settings.batch_size * settings.length == pytest.approx(524_288, rel=0.01)
    assert settings.micro_batches(8)[1] == settings.micro_batch_size
    for name in ("hqlt-{}", "hqlt-{}-delayed-streaming", "hqlt-{}-delayed-chunk", "transformer-{}", "deltanet-{}"):
        with torch.device("meta"):
            HQLTForCausalLM(preset(name.format(size), **settings.model))


@pytest.mark.slow
def test_one_update_of_the_340m_model_at_full_width(tmp_path):
    """24 layers of width 1,024 in float32: about 8 GB and one or two minutes."""
    (tmp_path / "in").mkdir()
    for i in range(8):
        (tmp_path / "in" / f"{i}.txt").write_text(f"{i} " * 2000)
    prepare(tmp_path / "in", tmp_path / "tokens", validation_share=0.2, test_share=0.2)
    settings = yaml.safe_load((CONFIGS / "hqlt-340m.yaml").read_text()) | {
        "batch_size": 2, "micro_batch_size": 1, "length": 256, "precision": "float32", "compile": False,
    }  # fmt: skip
    training = LanguageTrainer(
        TrainSettings(**settings), preset("hqlt-340m"), tmp_path / "tokens", tmp_path, Ranks(0, 1, torch.device("cpu"))
    )
    assert training.size == 399_233_024
    first, second = training.update(), training.update()
    assert first.loss == pytest.approx(10.37, abs=0.3)  # ln 32,000, before anything is learnt
    assert second.loss < first.loss
    assert first.skipped == second.skipped == 0
