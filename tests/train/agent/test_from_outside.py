"""An environment and an algorithm registered outside the package can do everything that the built-in ones can."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys

import pytest

from hqlt.agent.worlds import make_worlds
from hqlt.cli import main
from hqlt.train.agent import AgentSettings, AgentTrainer
from hqlt.train.agent.cell import AgentBudget, AgentCell
from hqlt.train.agent.run import load_agent, run
from tests.toys.agents import Bell, Reinforce, ReinforceSettings

OPTIONS = [
    "--env=Bell", "--options.wait=2", "--algorithm=toy-reinforce", "--toy-reinforce.gamma=0.9",
    "--model.hidden_size=8", "--num-envs=4", "--steps=400", "--evaluate-every=200", "--episodes=4",
]  # fmt: skip
SETTINGS = AgentSettings(
    env="Bell", options={"wait": 2}, algorithm="toy-reinforce", hyperparameters={"gamma": 0.9},
    model={"hidden_size": 8, "num_layers": 1, "window": 4}, num_envs=4, steps=400, evaluate_every=200, episodes=4,
)  # fmt: skip


def lines(folder):
    return (folder / "metrics.jsonl").read_text()


def test_command_line_and_python_give_the_same_run(tmp_path):
    """The run's folder names both, so that the agent can be loaded again."""
    main(["rl", "train", *OPTIONS, f"--folder={tmp_path / 'command'}"])
    run(SETTINGS, tmp_path / "call")
    assert lines(tmp_path / "command") == lines(tmp_path / "call")
    settings = json.loads((tmp_path / "command" / "config.json").read_text())["settings"]
    assert settings["algorithm"] == "toy-reinforce" and settings["toy_reinforce"]["gamma"] == 0.9
    trainer = load_agent(tmp_path / "command")
    assert isinstance(trainer.agent, Reinforce) and isinstance(trainer.envs, Bell)
    assert trainer.settings == SETTINGS
    main(["rl", "train", f"--config={tmp_path / 'call' / 'config.json'}", f"--folder={tmp_path / 'again'}"])
    assert lines(tmp_path / "again") == lines(tmp_path / "call")


def test_it_resumes_exactly_in_new_processes(tmp_path):
    run(SETTINGS, tmp_path / "whole")
    code = (
        "import signal, sys, tests.toys.agents as toys; from hqlt.cli import main; learn = toys.Reinforce.learn\n"
        "def stopped(self, experience):\n"
        "    if self.steps > 150 and '--stop' in sys.argv: signal.raise_signal(signal.SIGINT)\n"
        "    return learn(self, experience)\n"
        "toys.Reinforce.learn = stopped\n"
        f"main({['rl', 'train', *OPTIONS, f'--folder={tmp_path / chr(114)}']})"
    )
    for stop, status in (("--stop", 128 + signal.SIGINT), ("", 0)):
        done = subprocess.run([sys.executable, "-c", code, stop], capture_output=True, text=True, check=False)
        assert done.returncode == status, done.stdout + done.stderr
    assert "resuming after step" in done.stdout
    assert lines(tmp_path / "r") == lines(tmp_path / "whole")


def test_a_study_trains_and_tests_it(tmp_path):
    budget = AgentBudget(steps=60, algorithm="toy-reinforce", settings={"gamma": 0.9}, num_envs=4, evaluations=2,
                         episodes=4, test_episodes=4, along={"wait": [1, 2]})  # fmt: skip
    common = {"model": "LSTM", "config": {"memory": "lstm", "hidden_size": 8}, "task": "Bell"}
    *_, result = AgentCell(**common, task_options={"wait": 2}, budget=budget).run(tmp_path)
    assert [value for value, _ in result.fit.test.curve] == [1, 2]


def test_errors_name_the_option(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"toy-reinforce: expected one of .*, got 'gama'; did you mean 'gamma'"):
        dataclasses.replace(SETTINGS, hyperparameters={"gama": 1})
    with pytest.raises(ValueError, match="hyperparameters: expected PPOSettings, for ppo, got ReinforceSettings"):
        AgentSettings(hyperparameters=ReinforceSettings())
    with pytest.raises(ValueError, match="did you mean 'wait'"):
        AgentTrainer(dataclasses.replace(SETTINGS, options={"wat": 2}))
    with pytest.raises(SystemExit):
        main(["rl", "train", "--toy-reinforce.gama=1", f"--folder={tmp_path}"])
    assert "did you mean --toy-reinforce.gamma" in capsys.readouterr().err


def test_a_module_before_the_colon_is_imported():
    assert type(make_worlds("tests.toys.agents:Bell", 2, 0, wait=1)) is Bell
