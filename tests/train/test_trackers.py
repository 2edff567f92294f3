"""What trackers receive: TensorBoard, trackio and wandb behind one interface."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path

import pytest

from hqlt.cli import main
from hqlt.train.metrics import Trackers

FAKE = """
class Error(Exception): pass
class Settings(dict): pass
refused = False
calls = []
def init(**options):
    if refused:
        raise Error("no account\\nmore")
    calls.append(("init", options))
def log(numbers, step): calls.append(("log", step, numbers))
def finish(): calls.append(("finish",))
"""
LINE = {"step": 3, "loss": 0.5, "validation": None}


@pytest.fixture
def fake(monkeypatch):
    """A function that installs a module with the interface of wandb and trackio, by name."""

    def install(name: str):
        module = types.ModuleType(name)
        module.__spec__ = importlib.util.spec_from_loader(name, loader=None)
        exec(FAKE, module.__dict__)
        monkeypatch.setitem(sys.modules, name, module)
        return module

    return install


def track(folder: Path, wandb: bool) -> None:
    folder.mkdir(exist_ok=True)
    trackers = Trackers(folder, {"steps": 9}, 0, wandb)
    trackers.write(LINE)
    trackers.close()


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_a_tracker_receives_settings_and_numbers(name, fake, tmp_path):
    module = fake(name)
    track(tmp_path / "run", wandb=name == "wandb")
    (_, options), *others = module.calls
    assert options["config"] == {"steps": 9}
    assert (options["project"], options["name"]) == ("hqlt", (tmp_path / "run").as_posix())
    assert others == [("log", 3, {"loss": 0.5}), ("finish",)]


def test_wandb_is_not_used_unless_requested(fake, tmp_path):
    module = fake("wandb")
    track(tmp_path / "run", wandb=False)
    assert module.calls == []


def test_a_resumed_run_continues_that_of_its_folder(fake, tmp_path):
    module = fake("wandb")
    for folder in ("run", "run", "another"):
        track(tmp_path / folder, wandb=True)
    first, again, another = [call[1]["id"] for call in module.calls if call[0] == "init"]
    assert first == again != another


def test_wandb_that_cannot_start_is_an_error_with_a_remedy(fake, tmp_path):
    fake("wandb").refused = True
    with pytest.raises(ValueError, match=r"^--wandb: .* got: no account; run `wandb login`"):
        track(tmp_path / "run", wandb=True)


def test_without_the_package_nothing_is_begun(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, find=importlib.util.find_spec: (
        None if name == "wandb" else find(name)
    ))  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        main(["rl", "train", "--wandb", "--steps=10", "--folder=run"])
    assert "expected the package wandb; pip install" in str(ended.value.code)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", [["train"], ["rl", "train"], ["retrofit"]])
def test_the_help_names_all_three(command, capsys):
    with pytest.raises(SystemExit):
        main([*command, "--help"])
    help = " ".join(capsys.readouterr().out.split())
    assert "--wandb" in help
    assert all(name in help for name in ("Weights & Biases", "TensorBoard", "trackio"))


def test_wandb_itself_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    track(tmp_path / "run", wandb=True)
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
