import json

import pytest
import yaml

from hqlt.cli import main
from hqlt.cli.reproduce import find

STUDY = {
    "title": "Two models",
    "introduction": "Who runs?",
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


def test_a_study_runs_once_and_leaves_what_is_worth_committing(tmp_path, capsys):
    file, folder, results = tmp_path / "mine.yaml", tmp_path / "run", tmp_path / "results" / "mine"
    file.write_text(yaml.safe_dump(STUDY))
    command = ["reproduce", str(file), "--only=parity", f"--folder={folder}", "--workers=2", f"--export={results}"]
    main(command)
    assert "earlier start" not in capsys.readouterr().out
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
    assert capsys.readouterr().out.count("earlier start") == 4
    assert {path.name: path.stat().st_mtime_ns for path in (folder / "cells").iterdir()} == made

    file.write_text(yaml.safe_dump(STUDY).replace("steps: 6", "steps: 7"))
    with pytest.raises(SystemExit, match="holds the result of a cell with other settings; give another folder"):
        main(command)


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
