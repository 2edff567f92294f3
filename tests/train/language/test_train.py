"""The command as a user runs it: to the end, killed and resumed, with one process and with two."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time

import pytest
import torch
from safetensors.torch import load_file

from hqlt.cli import main
from tests.train.language.conftest import command, losses, train


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    """A run without interruption."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(text, folder)
    return folder


def test_the_files_of_a_run(whole):
    assert {"config.json", "metrics.jsonl", "results.json", "README.md", "curves.png", "report.html"} <= {
        path.name for path in whole.iterdir()
    }
    assert sorted(path.name for path in (whole / "checkpoints").iterdir()) == ["step-00000008", "step-00000012"]
    assert losses(whole)[-1] < losses(whole)[0]
    results = json.loads((whole / "results.json").read_text())
    assert 0 < results["test_bits_per_byte"] < 8


def test_the_model_loads_with_auto_classes(whole):
    from transformers import AutoModelForCausalLM

    import hqlt  # noqa: F401

    model = AutoModelForCausalLM.from_pretrained(whole / "model")
    assert model.generate(torch.tensor([[49, 32]]), max_new_tokens=3).shape == (1, 5)


@pytest.mark.parametrize("options", [(), ("--carry-state=true", "--micro-batch-size=4")], ids=["windows", "carried"])
def test_a_killed_run_resumes_bit_for_bit(text, whole, tmp_path, options):
    expected = whole
    if options:
        train(text, expected := tmp_path / "whole", *options)
    folder = tmp_path / "run"
    for wanted in (3, 6, 10):  # before the first checkpoint and after later ones
        process = subprocess.Popen(
            command(text, folder, *options),
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        metrics = folder / "metrics.jsonl"
        while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= wanted):
            time.sleep(0.01)
        process.kill()
        process.wait()
    train(text, folder, *options)
    assert losses(folder) == losses(expected)
    ours, theirs = (load_file(run / "model" / "model.safetensors") for run in (folder, expected))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_signal_saves_and_stops(text, whole, tmp_path, number):
    folder = tmp_path / "run"
    process = subprocess.Popen(
        command(text, folder, "--steps=100000"),
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while process.poll() is None and not (folder / "metrics.jsonl").exists():
        time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(number)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, printed
    done = len(losses(folder))
    assert f"saved after step {done}; run the same command again to resume" in printed
    assert (folder / "checkpoints" / f"step-{done:08d}").is_dir()


def test_a_second_ctrl_c_stops_at_once(text, tmp_path):
    folder = tmp_path / "run"
    process = subprocess.Popen(
        command(text, folder, "--batch-size=4096", "--warmup-steps=0"),  # slow updates
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while process.poll() is None and not (folder / "metrics.jsonl").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130, printed
    assert "Traceback" not in printed and "saved" not in printed
    assert losses(folder) == []


def test_a_runs_config_json_repeats_it(whole, tmp_path):
    folder = tmp_path / "again"
    main(["train", f"--config={whole / 'config.json'}", f"--folder={folder}"])
    assert losses(folder) == losses(whole)


def same_run(ours, theirs):
    torch.testing.assert_close(torch.tensor(losses(ours)), torch.tensor(losses(theirs)), rtol=2e-5, atol=0)
    ours, theirs = (load_file(run / "model" / "model.safetensors") for run in (ours, theirs))
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize(
    "options",
    [
        (),
        pytest.param(("--micro-batch-size=2",), marks=pytest.mark.slow),  # also part of "carried"
        ("--activation-checkpointing=true",),
        ("--shard-over=1",),
        ("--carry-state=true", "--micro-batch-size=2"),
    ],
    ids=["sharded", "accumulated", "recomputed", "replicated", "carried"],
)
def test_two_processes_give_the_result_of_one(text, whole, tmp_path, options):
    alone = whole
    if "--carry-state=true" in options:
        train(text, alone := tmp_path / "alone", "--carry-state=true")
    train(text, tmp_path / "two", *options, processes=2)
    same_run(tmp_path / "two", alone)


@pytest.mark.parametrize(
    "options",
    [pytest.param((), marks=pytest.mark.slow, id="windows"), pytest.param(("--carry-state=true",), id="carried")],
)
def test_a_run_resumes_with_another_number_of_processes(text, tmp_path, options):
    train(text, alone := tmp_path / "alone", *options)
    folder = tmp_path / "run"
    train(text, folder, *options, "--steps=4", "--min-lr-ratio=1", processes=2)
    train(text, folder, *options, "--steps=8", "--min-lr-ratio=1")
    train(text, folder, *options, "--min-lr-ratio=1", processes=2)
    train(text, alone := tmp_path / "constant", *options, "--min-lr-ratio=1")
    same_run(folder, alone)


def test_bfloat16_on_one_process_and_on_two(text, tmp_path):
    train(text, tmp_path / "one", "--precision=bfloat16")
    train(text, tmp_path / "two", "--precision=bfloat16", processes=2)
    ours, theirs = (torch.tensor(losses(tmp_path / name)) for name in ("one", "two"))
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=0)
    assert load_file(tmp_path / "one" / "model" / "model.safetensors")["lm_head.weight"].dtype == torch.float32


@pytest.mark.slow
def test_compiled_blocks_give_the_same_result(text, whole, tmp_path):
    train(text, tmp_path / "run", "--compile=true")
    assert losses(tmp_path / "run") == pytest.approx(losses(whole), rel=1e-5)
