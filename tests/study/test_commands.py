import dataclasses
import shlex
import sys
from types import SimpleNamespace

import pytest
from rich.console import Console

from hqlt.cli import main
from hqlt.model import preset
from hqlt.study import commands
from hqlt.study.commands import print_and_run, runs_of


@pytest.fixture
def ran(monkeypatch, tmp_path):
    """Two GPUs, and a record of the commands that are run; they succeed unless a status is set."""
    ran = SimpleNamespace(commands=[], status=0)

    def run(command, check):
        ran.commands.append(command)
        return SimpleNamespace(returncode=ran.status)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("subprocess.run", run)
    return ran


@pytest.mark.parametrize(("what", "count"), [("language", 10), ("recall", 10), ("language-ablations", 6)])
def test_every_run_of_a_table_has_valid_commands(what, count):
    runs = runs_of(what, gpus=8)
    assert len({run.name for run in runs}) == count
    for run in runs:
        train, score = run.commands
        assert train[:5] == ["torchrun", "--nproc-per-node=8", "--module", "hqlt", "train"]
        given = dict(option.removeprefix("--").split("=") for option in train[5:])
        changes = {key.removeprefix("model."): value for key, value in given.items() if key.startswith("model.")}
        assert set(changes) <= set(preset(given["preset"]).to_dict())
        folder = given["folder"]
        assert score == ["hqlt", "eval", folder, "--suite=paper", "--device=cuda", f"--folder={folder}/eval"]
        assert 10 < run.hours < 200


def test_activation_checkpointing_takes_longer(monkeypatch):
    name, recipe = commands.recipe_of("340m")
    hours = []
    for choice in (True, False):
        changed = dataclasses.replace(recipe, activation_checkpointing=choice)
        monkeypatch.setattr(commands, "recipe_of", lambda size, changed=changed: (name, changed))
        hours.append(commands.run_of("hqlt-340m", {}, 8).hours)
    assert hours[0] == pytest.approx(hours[1] * 4 / 3)


def test_without_a_gpu_the_commands_are_printed(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    console = Console(record=True, width=200)
    print_and_run("language", None, console)
    printed = console.export_text()
    assert "Estimated total" in printed and "nothing was run" in printed
    text = printed.replace("\n", " ").replace("  ", " ")
    assert text.index("hqlt data prepare HuggingFaceFW/fineweb-edu") < text.index(
        shlex.join(runs_of("language", 8)[0].commands[0])
    )


def test_finished_work_is_not_repeated(ran, tmp_path):
    """Data come first, then training and evaluation of the selected run."""
    only = ["reproduce", "recall", "--scale=paper", "--only=hqlt-340m-window-128"]
    main(only)
    python = [sys.executable, "-m"]
    assert [command[: 4 + (command[2] != "hqlt")] for command in ran.commands] == [
        [*python, "hqlt", "data"],
        [*python, "torch.distributed.run", "--nproc-per-node=2", "--module"],
        [*python, "hqlt", "eval"],
    ]
    (tmp_path / "data" / "fineweb-edu").mkdir(parents=True)
    (tmp_path / "data" / "fineweb-edu" / "manifest.json").touch()
    (tmp_path / "runs" / "hqlt-340m-window-128" / "eval").mkdir(parents=True)
    (tmp_path / "runs" / "hqlt-340m-window-128" / "eval" / "results.json").touch()
    ran.commands.clear()
    main(only)
    assert ran.commands == []
    main([*only[:3], "--only=hqlt-340m"])
    assert [command[2] for command in ran.commands] == ["torch.distributed.run", "hqlt"]


def test_a_failed_command_is_named_and_the_rest_not_run(ran):
    ran.status = 3
    with pytest.raises(SystemExit, match=r"^hqlt data prepare .*got status 3"):
        main(["reproduce", "language", "--scale=paper"])
    assert len(ran.commands) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--quick", "--workers=2"],
            "--workers, --quick: expected no option but --only with language at the paper's scale",
        ),
        (["--folder=a", "--export=b"], "--folder, --export: expected"),
        (["--device=cuda"], "--device: expected"),
        (["--only=hqlt-340"], "did you mean 'hqlt-340m'"),
    ],
)
def test_options_that_do_not_apply_are_refused(ran, options, message):
    with pytest.raises(SystemExit, match=message):
        main(["reproduce", "language", "--scale=paper", *options])
    assert ran.commands == []
