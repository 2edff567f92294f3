"""What holds for every command."""

import sys

import pytest

from hqlt.cli import config_first, main
from hqlt.errors import first_line, reason


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["trian"], "did you mean train?"),
        (["data", "prepar", "x"], "did you mean prepare?"),
        (["train", "--stepz=3"], "did you mean --steps?"),
        (["train", "--config=FILE"], "did you mean --warmup?"),
    ],
)
def test_what_was_meant(arguments, meant, tmp_path, monkeypatch, capsys):
    (tmp_path / "a.yaml").write_text("warmpu: 10\n")
    arguments = [argument.replace("FILE", str(tmp_path / "a.yaml")) for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["hqlt", *arguments])
    with pytest.raises(SystemExit):
        main()
    assert meant in capsys.readouterr().err


def test_the_command_line_goes_before_a_file_in_any_order():
    assert config_first(["rl", "train", "--steps=3", "--config", "a.yaml", "--seed=1"]) == [
        "rl", "train", "--config", "a.yaml", "--steps=3", "--seed=1",
    ]  # fmt: skip
    assert config_first(["generate", "run", "--config=a.yaml"]) == ["generate", "run", "--config=a.yaml"]
    assert config_first(["demo"]) == ["demo"]


def test_a_field_of_the_model_beside_those_of_a_file(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr("hqlt.train.language.run.run", lambda settings, folder, device: given.append(settings))
    (tmp_path / "a.yaml").write_text("steps: 7\nmodel: {window: 8}\n")
    main(["train", "--model.mixer=sum", "--steps=8", f"--config={tmp_path / 'a.yaml'}"])
    assert given[0].model == {"window": 8, "mixer": "sum"}
    assert given[0].steps == 8


def test_a_package_that_is_missing_is_told_with_what_brings_it():
    assert reason(ModuleNotFoundError(name="matplotlib")).endswith("pip install 'hqlt[report]'")
    assert first_line(TimeoutError()) == "TimeoutError"
