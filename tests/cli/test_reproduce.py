import json

import pytest
import yaml

from hqlt.cli import main
from hqlt.cli.reproduce import find
from hqlt.run_folder import run_folder
from hqlt.train.grid import CellsFailed

STUDY = {
    "title": "Two models",
    "introduction": "A test.",
    "seeds": [0, 1],
    "models": {"DeltaNet, β ≤ 2": {"layer_kinds": "fw"}, "Synchronous": {}},
    "experiments": {
        "parity": {
            "task": "parity",
            "options": {"train_lengths": [3, 6], "test_lengths": [6, 12]},
            "common": {"hidden_size": 16, "num_heads": 2, "num_hidden_layers": 1, "window": 4},
            "budget": {"steps": 6, "batch_size": 8, "validations": 2, "validation_rows": 8, "test_rows": 32},
            "paper": {"Synchronous": 100.0},
        },
        "cycle": {
            "task": "cycle",
            "common": {"hidden_size": 16, "num_heads": 2, "num_hidden_layers": 1, "window": 4},
            "budget": {"steps": 2, "batch_size": 8, "validations": 1, "validation_rows": 8, "test_rows": 32},
        },
    },
}


def test_a_study_runs_once_and_exports_its_results(tmp_path, capsys):
    file, folder, results = tmp_path / "mine.yaml", tmp_path / "run", tmp_path / "results" / "mine"
    file.write_text(yaml.safe_dump(STUDY))
    command = ["reproduce", str(file), "--only=parity", f"--folder={folder}", "--workers=2", f"--export={results}"]
    main(command)
    assert "earlier run" not in capsys.readouterr().out
    assert {path.name for path in results.iterdir()} == {"README.md", "results.json", "curves.png"}
    kept = json.loads((results / "results.json").read_text())
    assert [(r["cell"]["model"], r["cell"]["seed"]) for r in kept] == [
        (model, seed) for model in STUDY["models"] for seed in (0, 1)
    ]
    assert len(kept[0]["history"]) == 2
    page = (results / "README.md").read_text()
    assert "| model | parity, accuracy % | paper | seconds |" in page
    assert "steps=6" in page
    assert (folder / "report.html").exists()
    made = {path.name: path.stat().st_mtime_ns for path in (folder / "cells").iterdir()}
    assert set(made) == {f"parity-{m}-seed{s}.json" for m in ("deltanet-beta-2", "synchronous") for s in (0, 1)}

    main(command)
    assert capsys.readouterr().out.count("earlier run") == 4
    assert {path.name: path.stat().st_mtime_ns for path in (folder / "cells").iterdir()} == made

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len({(line["cell"], line["step"]) for line in lines}) == len(lines) == 4 * 6
    config = (folder / "config.json").read_bytes()
    file.write_text(yaml.safe_dump(STUDY).replace("steps: 6", "steps: 7"))
    with pytest.raises(SystemExit, match="has the result of a cell with other settings; give another folder"):
        main(command)
    with run_folder(folder, "study"), pytest.raises(SystemExit, match="another process is using this folder"):
        main(command)
    kept = folder / "cells" / next(iter(made))
    kept.write_text("{}")
    with pytest.raises(SystemExit, match="expected the result of a cell as JSON, got KeyError"):
        main(command)
    assert (folder / "config.json").read_bytes() == config, "what is refused changes nothing"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--workers=-1"], "^workers: expected at least 1, got -1$"),
        (["--only=parrity"], r"^only: expected one of 'cycle', 'parity', got 'parrity'; did you mean 'parity'\?$"),
        (["--device=cdua"], "^device: expected one that torch can use here"),
        (["--folder=mine.yaml"], "^mine.yaml"),
        (["--folder=mine.yaml/run"], "^mine.yaml/run"),
        (["--folder=full"], "^full: expected a new or empty folder"),
        (["--export=mine.yaml"], "^mine.yaml: expected a folder, found a file$"),
        (["--export=mine.yaml/results"], "^mine.yaml/results: .*mine.yaml is a file, not a folder$"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hqlt.study.run.run_grid", lambda *_: pytest.fail("it was trained"))
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(STUDY))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit, match=message):
        main(["reproduce", "mine.yaml", *options])
    assert sorted(tmp_path.rglob("*")) == before


def test_failed_cells_are_named_and_the_others_reported(tmp_path, monkeypatch, capsys):
    def fail(cells, folder, *_):
        (folder / "cells").mkdir()
        raise CellsFailed("1 of 4 cells failed 2 times:\nparity: why")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hqlt.study.run.run_grid", fail)
    monkeypatch.setattr("hqlt.cli.reproduce.plugin_modules", lambda: ["mine"])  # as if it had registered something
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(STUDY))
    with pytest.raises(SystemExit, match=r"(?s)parity: why.*again with: hqlt --import=mine reproduce mine.yaml"):
        main(["reproduce", "mine.yaml"])


def test_names_and_aliases():
    assert find("expressivity", "laptop")[0] == find("table-2", "laptop")[0] == "expressivity-laptop"
    assert find("table-2", "paper")[1].name == "expressivity-paper.yaml"
    with pytest.raises(SystemExit, match="did you mean 'expressivity'"):
        main(["reproduce", "expresivity"])
    with pytest.raises(SystemExit, match="scale: expected one that ablations has, got 'paper'"):
        main(["reproduce", "ablations", "--scale=paper"])
    with pytest.raises(SystemExit, match="only: expected one of 'parity', 'arithmetic', got 'text'"):
        main(["reproduce", "expressivity", "--only=text"])
    with pytest.raises(SystemExit, match="device: expected one that torch can use here"):
        main(["reproduce", "expressivity", "--device=nothing"])
