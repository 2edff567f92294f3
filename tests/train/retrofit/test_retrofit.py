"""Retrofit: each stage lowers its loss, interrupted runs resume exactly, and the result is an ordinary model."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import re
import signal

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hqlt.cli import main
from hqlt.data import TokenFiles, Windows
from hqlt.errors import how_to_install
from hqlt.evaluate.probes import recall
from hqlt.language.folder import load_model
from hqlt.model import HQLTForCausalLM
from hqlt.model.pretrained.retrofit import retrofitted
from hqlt.train.retrofit.layers import costs_of_window
from hqlt.train.retrofit.losses import beyond, layer_errors, watch_attention
from hqlt.train.retrofit.settings import RetrofitSettings
from hqlt.train.retrofit.trainer import RetrofitTrainer
from tests.train.retrofit.conftest import lines, retrofit

needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs the package peft")
LORA = "--lora-rank=2"


@pytest.fixture(scope="module")
def whole(teacher, text, tmp_path_factory):
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    retrofit(teacher, text, folder, "--tune.tokens=480", "--tune.length=20")
    return folder


def test_each_stage_lowers_its_loss(whole):
    by_stage = {stage: [line["loss"] for line in lines(whole) if line["stage"] == stage] for stage in (1, 2, 3)}
    assert [len(losses) for losses in by_stage.values()] == [16, 8, 6]
    found = results(whole)
    scores = found["run"]["scores"]
    assert scores["original"]["kl"] == pytest.approx(0, abs=1e-6)
    assert scores["distill"]["kl"] < scores["fit"]["kl"] < scores["start"]["kl"]
    assert scores["tune"]["nats"] < scores["distill"]["nats"]
    assert [(row["name"], row.get("bypassed")) for row in found["rows"]] == [
        ("original", None), ("window + sinks", None), ("delta", None), ("delta", True),
    ]  # fmt: skip
    window, result, bypassed = (row["probe"]["nll"] for row in found["rows"][1:])
    assert len({window, result, bypassed}) == 3, "one layer keeps full attention, and the FW-memories contribute"


def test_stage_1_fits_each_layer_to_the_original(teacher, text, tmp_path, capsys):
    found = retrofit(teacher, text, tmp_path / "run", "--fit.tokens=9216", "--distill.tokens=0")
    original, result = load_model(teacher), load_model(tmp_path / "run")
    printed = capsys.readouterr().out
    assert re.search(
        r"untrained: KL from the original \d\.\d+ nats, perplexity .*stage 1 done: KL .* \d\.\d+ nats",
        printed,
        re.DOTALL,
    )
    batch = Windows(TokenFiles(tmp_path / "run" / "data"), 48).batch(0, 16)
    scored, layers = beyond(batch, visible=5), sorted({0, 1, 2} - set(found["run"]["layers"]["full"]))
    with torch.no_grad():
        start, end = (
            layer_errors(original, model, batch, scored, layers, 1.0)
            for model in (retrofitted(original, result.config), result)
        )
    assert all(end[layer] < start[layer] for layer in layers)


def test_layers_with_the_highest_costs_keep_full_attention(whole):
    found = json.loads((whole / "config.json").read_text())["layers"]
    assert found["full"] == [found["costs"].index(max(found["costs"]))]
    first = lines(whole)[0]
    assert [f"layer_{layer}" in first for layer in range(3)] == [layer not in found["full"] for layer in range(3)]


def output_of(model, layer, batch):
    """The output of a layer's attention."""
    outputs = {}
    watch_attention(model, batch, lambda each, x, resets, output: outputs.update({each: output}))
    return outputs[layer]


@pytest.mark.parametrize("how", ["recall", "error"])
def test_costs_of_the_window_by_layer(teacher, whole, how):
    """Each cost is that of the original with a window in this layer only."""
    original, windows = load_model(teacher).eval(), Windows(TokenFiles(whole / "data", "train"), 24, 0)
    settings = RetrofitSettings(window=4, sinks=1, full_choice=how, measure_tokens=96, micro_batch_size=4)
    costs = costs_of_window(settings, original, windows)
    batch = windows.batch(0, 4)
    for layer, cost in enumerate(costs):
        config = copy.deepcopy(original.config)
        config.sinks, config.kv_window = 1, [4 if each == layer else None for each in range(3)]
        changed = HQLTForCausalLM(config).eval()
        changed.load_state_dict(original.state_dict())
        if how == "recall":
            expected = recall(changed, batch.inputs, 24, 6)["nll"] - recall(original, batch.inputs, 24, 6)["nll"]
        else:
            y, windowed = (output_of(model, layer, batch)[beyond(batch, 5)] for model in (original, changed))
            expected = ((windowed - y).square().sum() / y.square().sum()).item()
        assert cost == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_nothing_is_measured_if_the_layers_are_given(teacher, text, tmp_path):
    budget = ["--fit.tokens=0", "--distill.tokens=0", "--validation-rows=0"]
    for number, option in enumerate(["--full=[1]", "--full=0", "--full-choice=random"]):
        retrofit(teacher, text, tmp_path / str(number), *budget, option)
        assert not (tmp_path / str(number) / "layers.json").exists()


def test_the_result_is_an_ordinary_model(whole, teacher, capsys):
    model = AutoModelForCausalLM.from_pretrained(whole / "model")
    assert sorted(model.config.kinds) == ["hybrid", "hybrid", "kv"]
    assert model.generation_config.eos_token_id == 7
    main(["generate", str(whole), "--prompt=abc", "--max-new-tokens=4", "--greedy"])
    assert capsys.readouterr().out
    theirs, ours = (load_file(folder / "model.safetensors") for folder in (teacher, whole / "model"))
    assert all(torch.equal(ours[name], weight) for name, weight in theirs.items())
    assert not torch.equal(ours[gate := next(name for name in ours if "mixer.gate" in name)], 0 * ours[gate])


@pytest.mark.parametrize("lora", [(), pytest.param((LORA,), marks=needs_peft)], ids=["new parameters", "lora"])
def test_stopped_anywhere_it_resumes_exactly(teacher, text, whole, tmp_path, monkeypatch, lora, capsys):
    options = ("--tune.tokens=480", "--tune.length=20", *lora)
    if lora:
        retrofit(teacher, text, whole := tmp_path / "whole", *options)
    update, stops = RetrofitTrainer.update, [2, 16, 21, 28]  # stage 1 ends after update 16

    def stopped(trainer, *arguments):
        result = update(trainer, *arguments)
        if stops and result.step == stops[0]:
            stops.pop(0)
            os.kill(os.getpid(), signal.SIGINT)
        return result

    monkeypatch.setattr(RetrofitTrainer, "update", stopped)
    for step in (2, 16, 21, 28):
        with pytest.raises(SystemExit) as ended:
            retrofit(teacher, text, tmp_path / "run", *options)
        assert ended.value.code == 130
        assert f"stopped and saved after step {step}" in capsys.readouterr().out
    assert retrofit(teacher, text, tmp_path / "run", *options)["rows"] == results(whole)["rows"]
    assert lines(tmp_path / "run") == lines(whole)
    ours, theirs = (load_file(run / "model" / "model.safetensors") for run in (tmp_path / "run", whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def results(folder):
    return json.loads((folder / "results.json").read_text())


@needs_peft
@pytest.mark.parametrize("rule", ["delta", "none"])
def test_merging_lora_changes_no_logits(teacher, text, tmp_path, monkeypatch, rule):
    """With rule none there is no stage 1, and only LoRA is trained."""
    unmerged = {}

    def compare_and_save(trainer, *arguments):
        tokens = torch.arange(30)[None]
        unmerged["logits"] = trainer.student.eval()(tokens, use_cache=False).logits
        unmerged["teacher"] = trainer.teacher(tokens, use_cache=False).logits
        assert trainer.lora is not None
        return save_model(trainer, *arguments)

    from hqlt.train.retrofit import run

    save_model = run.save_model
    monkeypatch.setattr(run, "save_model", compare_and_save)
    found = retrofit(teacher, text, tmp_path / "run", LORA, f"--rule={rule}", "--lora-learning-rate=0.01")
    scores = found["run"]["scores"]
    assert ("fit" in scores, len(found["rows"])) == ((True, 4) if rule == "delta" else (False, 3))
    assert scores["distill"]["kl"] < scores["start"]["kl"]
    merged, original = load_model(tmp_path / "run"), load_model(teacher)
    tokens = torch.arange(30)[None]
    torch.testing.assert_close(merged(tokens).logits, unmerged["logits"], rtol=1e-4, atol=1e-4)
    assert torch.equal(original(tokens).logits, unmerged["teacher"])
    names = set(merged.state_dict())
    assert not any("lora" in name or "base_layer" in name for name in names)
    assert names >= set(original.state_dict())
    for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.2.memory.o_proj.weight"):
        assert not torch.equal(merged.state_dict()[name], original.state_dict()[name])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--full=3",), r"full: expected from 0 to 2 of the model's 3 layers, got 3"),
        (("--full=[0,5]",), r"full: expected indices of layers from 0 to 2, got \[5\]"),
        (("--window=24",), r"distill.length: expected more than window \+ sinks = 25 tokens"),
        (("--rule=none",), "lora_rank: expected at least 1 with rule none"),
        (("--rule=no-such",), "fast_weights: expected one of"),
        (("--options={window: 3}",), "options: expected window as --window"),
        (("--fit.batch-size=3",), "micro_batch_size: expected a divisor of fit.batch_size = 3, got 2"),
        (("--data=nowhere",), "data: expected a text file, a folder"),
    ],
)
def test_errors_are_raised_before_anything_is_written(teacher, text, tmp_path, options, message):
    with pytest.raises(SystemExit, match=message):
        retrofit(teacher, text, tmp_path / "run", *options)
    assert not (tmp_path / "run").exists()


def test_a_retrofitted_model_is_refused(whole, text, tmp_path):
    with pytest.raises(SystemExit, match=r"model: expected only kv layers.* got also hybrid layers"):
        retrofit(whole, text, tmp_path / "run")


def test_short_texts_are_refused(teacher, tmp_path):
    folder = tmp_path / "documents"
    folder.mkdir()
    for i in range(400):
        (folder / f"{i}.txt").write_text(f"{i:04}")
    main(["data", "prepare", str(folder), f"--folder={tmp_path / 'tokens'}"])
    with pytest.raises(SystemExit, match=r"data: expected documents of more than window \+ sinks = 5 tokens"):
        retrofit(teacher, tmp_path / "tokens", tmp_path / "run")


def test_random_layers_and_changed_settings(teacher, text, whole, tmp_path):
    """With random layers; and a run with other settings does not resume in the same folder."""
    chance = retrofit(teacher, text, tmp_path / "run", "--full-choice=random", "--fit.tokens=0", "--distill.tokens=0")
    assert len(chance["run"]["layers"]["full"]) == 1
    window, result, bypassed = (row["probe"]["nll"] for row in chance["rows"][1:])
    assert result == bypassed != window, "untrained FW-memories add nothing; in the window row, all layers are windowed"
    again = f"--config={tmp_path / 'run' / 'config.json'}"
    main(["retrofit", str(teacher), str(tmp_path / "again"), again, "--validation-rows=0"])
    ours, theirs = (load_file(tmp_path / run / "model" / "model.safetensors") for run in ("again", "run"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert json.loads((tmp_path / "again" / "results.json").read_text())["rows"] == []
    with pytest.raises(SystemExit, match=r"belongs to a run with another distill.learning_rate"):
        retrofit(teacher, text, whole, "--tune.tokens=480", "--tune.length=20", "--distill.learning_rate=0.1")


@pytest.mark.skipif(importlib.util.find_spec("peft") is not None, reason="peft is installed")
def test_without_peft_the_error_says_how_to_install_it(teacher, text, tmp_path):
    with pytest.raises(SystemExit) as ended:
        retrofit(teacher, text, tmp_path / "run", LORA)
    assert str(ended.value) == f"expected the package peft; {how_to_install('retrofit')}"
