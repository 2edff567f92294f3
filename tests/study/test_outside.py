"""Studies on tasks from outside hqlt: from an imported module, and from an installed package."""

import json
import sys

import pytest
import yaml

from hqlt.cli import main
from hqlt.study import read_study
from tests.toys import task as toy

STUDY = {
    "title": "A task from outside",
    "introduction": "A test.",
    "models": {"DeltaNet": {"layer_kinds": "fw"}, "Synchronous": {}},
    "experiments": {
        "majority": {
            "task": "toy-majority",
            "options": {"length": 7},
            "common": {"hidden_size": 8, "num_heads": 2, "num_hidden_layers": 1, "window": 4},
            "budget": {"steps": 2, "batch_size": 4, "validations": 1, "validation_rows": 8, "test_rows": 8},
        }
    },
}
PACKAGE = """
import hqlt
from tests.toys.task import Majority

@hqlt.register("task", "toy-installed")
class Installed(Majority): pass
"""


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(task):
        experiment = STUDY["experiments"]["majority"] | {"task": task}
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(STUDY | {"experiments": {"majority": experiment}}))

    return write


def test_worker_processes_know_the_task(study, capsys):
    study("toy-majority")
    assert toy.Majority(length=7).vocab_size == 3
    main(["reproduce", "study.yaml", "--workers=2", "--folder=run"])
    with open("run/results.json") as file:
        assert [result["cell"]["task"] for result in json.load(file)] == ["toy-majority"] * 2
    assert "majority" in capsys.readouterr().out


def test_an_installed_package_registers_its_task(study, tmp_path, monkeypatch):
    (tmp_path / "toy_installed.py").write_text(PACKAGE)
    info = tmp_path / "toy_installed-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-installed\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[hqlt]\ntoys = toy_installed\n")
    study("toy-installed")
    with pytest.raises(ValueError, match=r"majority.task: expected one of .*, got 'toy-installed'"):
        read_study(tmp_path / "study.yaml")
    monkeypatch.syspath_prepend(tmp_path)
    (cell, _) = read_study(tmp_path / "study.yaml").cells()
    assert type(cell.build_task()).__module__ == "toy_installed"
    sys.modules.pop("toy_installed")
