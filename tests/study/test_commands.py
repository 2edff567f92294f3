import shlex

import pytest
from rich.console import Console

from hqlt.model import preset
from hqlt.study.commands import print_and_run, runs_of


@pytest.mark.parametrize(("what", "count"), [("language", 10), ("recall", 10)])
def test_every_run_of_a_table_is_a_command_of_ours(what, count):
    runs = runs_of(what, gpus=8)
    assert len({run.name for run in runs}) == count
    for run in runs:
        train, score = run.commands
        assert train[:5] == ["torchrun", "--nproc-per-node=8", "--module", "hqlt", "train"]
        given = dict(option.removeprefix("--").split("=") for option in train[5:])
        changes = {key.removeprefix("model."): value for key, value in given.items() if key.startswith("model.")}
        assert set(changes) <= set(preset(given["preset"]).to_dict())
        assert score == ["hqlt", "eval", given["folder"], "--suite=paper"]
        assert 10 < run.hours < 200


def test_without_a_gpu_the_commands_are_printed(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    console = Console(record=True, width=200)
    print_and_run("language", console)
    printed = console.export_text()
    assert "nothing was run" in printed
    assert shlex.join(runs_of("language", 8)[0].commands[0]) in printed.replace("\n", " ").replace("  ", " ")
