"""The GPU benchmarks run on a machine without a GPU, as far as possible."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hqlt.bench import gpu, gpu_stages

ROOT = Path(__file__).parents[2]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def started(*command: object, **changed: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "REHEARSE"} | changed
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, cwd=ROOT)


@needs_no_gpu
def test_the_script_ends_if_there_is_no_gpu(tmp_path):
    """It finds a python, begins the first stage, reports why it ends, and writes its log."""
    done = started("bash", "benchmarks/gpu.sh", tmp_path / "figures", PYTHON=sys.executable)
    assert done.returncode == 2, done.stdout + done.stderr
    log = (tmp_path / "figures" / "log.txt").read_text()
    assert "1 card: begins" in log and "card: no GPU: expected one that torch" in log
    assert log.splitlines()[-1].endswith("no GPU: the end")
    assert [file.name for file in (tmp_path / "figures").iterdir()] == ["log.txt"]


@needs_no_gpu
def test_a_rehearsal_is_no_measurement(tmp_path, monkeypatch):
    """The same code runs; the files have distinct names, say that they are a rehearsal, and hold no times or rates."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    gpu_stages.main(["card", str(tmp_path), "--rehearse"])
    (file,) = tmp_path.iterdir()
    answer = json.loads(file.read_text())
    assert file.name == "rehearsal-card.json" and "not a measurement" in answer["rehearsal"]
    assert (answer["copied TB/s"], answer["dense TFLOP/s"]) == (None, None)
    assert answer["setting"]["torch"] == torch.__version__


def test_errors_say_what_a_stage_needs(tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(SystemExit, match="--rehearse: expected TRITON_INTERPRET=1"):
        gpu_stages.main(["right", str(tmp_path), "--rehearse"])
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="right: no GPU: expected one that torch"):
            gpu_stages.main(["right", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_a_contestant_that_fails_or_is_wrong_is_skipped_with_its_reason(capsys):
    def broken() -> list[torch.Tensor]:
        raise RuntimeError("out of resources\nand more")

    contestants = {
        "right": lambda: [torch.ones(3)],
        "wrong": lambda: [torch.zeros(3)],
        "not a number": lambda: [torch.full((3,), math.nan)],
        "broken": broken,
    }
    able = gpu.runnable(contestants, lambda run: run(), [torch.ones(3)])
    assert list(able) == ["right"]
    wrong, no_number, failed = capsys.readouterr().out.splitlines()
    assert wrong.startswith("skipped: wrong: SystemExit: wrong differs from the expected result by 1.0e+00")
    assert no_number.startswith("skipped: not a number")
    assert failed == "skipped: broken: RuntimeError: out of resources"


def test_windows_of_flex_attention_equal_ours(monkeypatch):
    from hqlt.ops import window_attention

    compile = torch.compile  # which PyTorch calls itself, with options
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile(f, **options) if options else f)
    q, k, v = torch.randn(3, 2, 20, 2, 16)
    with pytest.warns(UserWarning, match="without torch.compile"):
        got = gpu.flex_window(5, 20, torch.device("cpu"))(q, k, v)
    torch.testing.assert_close(got, window_attention(q, k, v, window=5), rtol=1e-5, atol=1e-5)


@needs_triton
def test_the_sweep_begins_with_the_options_in_use():
    from hqlt.bench.gpu_kernels import candidates
    from hqlt.ops.synchronous.kernels.launch import NARROW, WIDE

    for table in (NARROW, WIDE):
        first = {}
        every = candidates(table, quick=False)
        for kernel, options in every:
            first.setdefault(kernel, options)
        assert first == {kernel: options for kernel, options in table.items() if kernel not in ("step", "list_far")}
        assert len(set(every)) == len(every) == 3 * 6 + 3 * 18


def test_the_suite_runs_without_the_native_library():
    """As on a machine without a compiler. Slower implementations run with a warning, which is not an error here."""
    chosen = ("-p", "no:cacheprovider", "tests/ops/test_backend.py", "-k", "choice")
    done = started(sys.executable, "-m", "pytest", *chosen, HQLT_NATIVE_ISA="none")
    assert done.returncode == 0, done.stdout
