"""Every benchmark runs, finds its contestants equal and writes its results. (The times are not tested.)"""

import json
import math
import os

import pytest
import torch

from hqlt.cli import main

pytest.importorskip("transformers")


@pytest.mark.parametrize(
    ("what", "contestants"),
    [
        ("ops", {"transformers", "chunked", "blocked", "native", "SDPA, band mask", "SDPA, full causal"}),
        ("layer", {"peer delta, SDPA band", "chunked, blocked", "native"}),
        (
            "step",
            {"projections", "both memories, mixer and norm, native step", "window 2 and 6 kept", "SDPA over a cache"},
        ),
        ("train", {"peer delta, SDPA band", "chunked, blocked", "native", "memories removed: the limit"}),
    ],
)
def test_a_benchmark_leaves_its_figures(what, contestants, tmp_path, capsys):
    file = tmp_path / "some" / "figures.json"
    main(["bench", what, "--quick", "--rounds=1", "--threads=1", f"--json={file}"])
    written = json.loads(file.read_text())
    assert contestants <= {row["implementation"] for row in written["results"]}
    assert written["setting"]["threads"] == 1
    for row in written["results"]:
        for figures in (value for value in row.values() if isinstance(value, dict)):
            assert figures["ms"] > 0
            assert math.isfinite(figures["of ceiling"])
    assert f"hqlt bench {what}" in capsys.readouterr().out


def test_one_part_of_a_benchmark(tmp_path):
    main(["bench", "ops", "--only=linear", "--quick", "--rounds=1", f"--json={tmp_path / 'figures.json'}"])
    results = json.loads((tmp_path / "figures.json").read_text())["results"]
    assert {row["case"] for row in results} == {"linear attention"}
    with pytest.raises(SystemExit, match=r"only: expected one of 'delta', 'gated-delta', .*'retention', got 'nothing'"):
        main(["bench", "ops", "--only=nothing", "--quick"])
    with pytest.raises(SystemExit):
        main(["bench", "everything"])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("--threads=0", r"^threads: expected 1 to \d+, got 0$"),
        ("--threads=1000000", r"^threads: expected 1 to \d+, got 1000000$"),
        ("--rounds=0", "^rounds: expected at least 1, got 0$"),
        ("--only=linaer", r"^only: expected one of .*, got 'linaer'; did you mean 'linear'\?$"),
        ("--json=file/figures.json", "^file/figures.json: .*file is a file, not a folder$"),
        ("--json=closed/figures.json", "^closed/figures.json: cannot be written there: "),
        ("--json=folder", "^folder: expected a file, found a folder$"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_measured(wrong, message, tmp_path, monkeypatch):
    if "closed" in wrong and not os.path.isdir("/proc"):
        pytest.skip("needs a folder in which not even root may write")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hqlt.bench.ops.run", lambda *_: pytest.fail("it was measured"))
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "closed").symlink_to("/proc")  # where not even root may write
    with pytest.raises(SystemExit, match=message):
        main(["bench", "ops", "--quick", wrong])
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder", "closed"}


def test_steps_of_the_worlds(tmp_path, capsys):
    pytest.importorskip("gymnasium")
    file = tmp_path / "figures.json"
    main(["bench", "worlds", "--quick", "--only=VisualMatch", "--rounds=2", f"--json={file}"])
    written = json.loads(file.read_text())
    assert {"cores", "load before"} <= written["setting"].keys()
    assert {row["case"] for row in written["results"]} == {"VisualMatch"}
    for row in written["results"]:
        rate = row["steps per second"]
        assert 0 < rate["slowest"] <= rate["median"] <= rate["fastest"]
    assert "one by one" in capsys.readouterr().out


def test_without_a_gpu_its_benchmark_says_so(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit, match=r"hqlt bench gpu: expected a CUDA GPU .* found none; the other benchmarks"):
        main(["bench", "gpu", "--quick", f"--json={tmp_path / 'figures.json'}"])
    assert not list(tmp_path.iterdir())


def test_what_clients_of_a_server_wait_for(tmp_path):
    pytest.importorskip("fastapi")
    file = tmp_path / "figures.json"
    main(["bench", "serve", "--quick", "--rounds=1", "--threads=1", f"--json={file}"])
    written = json.loads(file.read_text())
    assert {row["case"] for row in written["results"]} == {"first token", "streams", "sessions", "prompt lookup"}
    assert written["setting"]["clock"] == "the wall's"
    for row in written["results"]:
        assert all(value == value and value != 0 for value in row["measured"].values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_token_after_a_long_context(dtype, tmp_path):
    file = tmp_path / "figures.json"
    main(["bench", "decode", "--quick", "--rounds=1", "--threads=1", f"--only={dtype}", f"--json={file}"])
    results = json.loads(file.read_text())["results"]
    assert {row["case"] for row in results} == {f"{dtype}, context 200"}
    state = {row["implementation"]: row["state"]["MB"] for row in results}
    number = {"float32": 4, "bfloat16": 2}[dtype]
    assert state["original in transformers"] == 5 * 2 * 200 * 8 * number / 1e6
    assert state["original"] >= state["original in transformers"] > state["window 64 + 4 sinks"]
    for row in results:
        assert row["decoding"]["ms"] > 0
        assert row["reading"]["ms"] > 0
