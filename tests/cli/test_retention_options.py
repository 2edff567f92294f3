"""Options for KV entries kept beyond the window, of a trained model and of a model to be trained."""

from __future__ import annotations

import json

import pytest
import torch

import hqlt
from hqlt.agent.memory_model import build_memory
from hqlt.cli import main, rl, train
from hqlt.cli.parser import parse, parser_of
from hqlt.language.folder import load_model
from tests.language.conftest import build

OPTIONS = ["--retention=surprise", "--window=3", "--kept=5", "--sinks=1"]
KEPT = {"retention": "surprise", "window": 3, "kept": 5, "sinks": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    build().save_pretrained(folder / "model")
    return folder


def test_the_text_is_that_of_a_model_saved_with_retention(folder, tmp_path, capsys):
    hqlt.with_retention(load_model(folder), **KEPT).save_pretrained(tmp_path / "kept")
    options = ["--prompt=a text, longer than any window", "--max-new-tokens=20", "--greedy"]
    printed = {}
    for name, command in {
        "enabled": [str(folder), *OPTIONS],
        "saved with it": [str(tmp_path / "kept")],
        "without": [str(folder)],
    }.items():
        main(["generate", *command, *options])
        printed[name] = capsys.readouterr()
    assert printed["enabled"].out == printed["saved with it"].out != printed["without"].out
    assert (
        printed["enabled"].err == "retention surprise in 2 of 2 layers: 3 recent + 5 kept + 1 sink per KV head; "
        f"{bytes_of(tmp_path / 'kept'):,} bytes of state per layer and sequence, {bytes_of(folder):,} before\n"
    )
    assert printed["without"].err == ""


def bytes_of(folder):
    return load_model(folder).model.layers[0].memory.init_state(1).bytes_per_row()


def test_a_state_belongs_to_the_retention_options(folder, tmp_path, capsys):
    state = f"{tmp_path / 'state'}"
    main(["generate", str(folder), *OPTIONS, "--prompt=a text", "--max-new-tokens=0", f"--save-state={state}"])
    again = ["generate", str(folder), "--prompt= and more", "--max-new-tokens=3", f"--load-state={state}"]
    main([*again, *OPTIONS])
    with pytest.raises(SystemExit, match="state"):
        main(again)


def test_an_evaluation_reports_the_retention_options(folder, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    text = tmp_path / "text"
    text.write_text("a text, longer than any window\n" * 3)
    hqlt.with_retention(load_model(folder), **KEPT).save_pretrained(tmp_path / "kept")
    written = []
    for command in ([str(folder), *OPTIONS], [str(tmp_path / "kept")]):
        main(["eval", *command, f"--lengths={text}", f"--folder={tmp_path / 'results'}"])
        written.append(json.loads((tmp_path / "results" / "results.json").read_text()))
    one, other = written
    assert one["results"] == other["results"]
    assert one["settings"]["fingerprint"] == other["settings"]["fingerprint"]
    assert KEPT.items() <= one["settings"].items() and KEPT.items() <= one["config"].items()
    assert "5 kept" in capsys.readouterr().out
    assert "Which KV entries are kept" in (tmp_path / "results" / "report.html").read_text()
    assert (tmp_path / "results" / "kept.png").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kept=5"], "retention: expected one with --kept, such as --retention surprise, got none"),
        (["--window=5", "--kept-norm"], "retention: expected one with --window, --kept-norm, such as"),
        (["--retention=surprise"], "kept: expected at least 1, the number of entries"),
        (["--retention=suprise", "--kept=5"], "retention: .* got 'suprise'; did you mean 'surprise'"),
        (["--retention=random", "--kept=5", "--score=error"], "score: expected an option of the chosen parts"),
        (
            ["--retention=recent", "--kept-positions=none"],
            "kept_positions, kept_norm, kept_gate: expected their defaults",
        ),
        (["--retention=surprise", "--kept=5", "--window=0"], "window: expected at least 1"),
        (["--retention=surprise", "--kept=5", "--sinks=-2"], "sinks: expected a number of entries, at least 0, got -2"),
    ],
)
@pytest.mark.parametrize("command", [["generate", "--prompt=a"], ["eval", "--passkey"]])
def test_invalid_options_are_refused_before_the_model_is_loaded(
    folder, tmp_path, monkeypatch, command, options, message
):
    monkeypatch.setattr("hqlt.language.folder.load_model", lambda *_: pytest.fail("the model was loaded"))
    monkeypatch.chdir(tmp_path)
    name, *rest = command
    with pytest.raises(SystemExit, match=message):
        main([name, str(folder), *rest, *options])
    assert not list(tmp_path.iterdir())


FIELDS = {
    "retention": "surprise",
    "window": 4,
    "kept": 5,
    "sinks": 2,
    "score": "beta-error",
    "kept_positions": "clamped",
    "kept_norm": True,
    "kept_gate": -4,
}


def test_training_takes_them_too():
    given = [f"--model.{name.replace('_', '-')}={json.dumps(value).strip(chr(34))}" for name, value in FIELDS.items()]
    fields = parse(parser_of(train.train, "hqlt train"), given)["model"]
    assert fields == FIELDS
    (layer, *_) = hqlt.HQLTForCausalLM(hqlt.preset("tiny", **fields)).model.layers
    arguments = parse(parser_of(rl.train, "hqlt rl train"), given)["model"]
    memory = build_memory("synchronous", **{**arguments, "hidden_size": 8})
    for kv in (layer.memory.kv, memory.layers[0].kv):
        assert (kv.kept, kv.sinks, kv.kept_positions, kv.retention.weighted) == (7, 2, "clamped", True)
        assert kv.q_norm is not None and torch.equal(kv.gate, torch.full_like(kv.gate, -4.0))
