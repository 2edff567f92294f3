"""`hqlt rl train` as a person runs it: killed, stopped, gone on with; and what it leaves to look at."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import hqlt
from hqlt.cli import main
from hqlt.errors import how_to_install
from hqlt.report.episode import film
from hqlt.train.agent import AgentTrainer
from hqlt.train.agent.checkpoints import AgentCheckpoints
from hqlt.train.agent.run import load_agent

COMMAND = [
    "rl", "train", "--options.corridor=6", "--model.hidden_size=8", "--copies=8", "--steps=6000", "--ppo.rollout=10",
    "--evaluate-every=800", "--episodes=4",
]  # fmt: skip
SAC = [
    "rl", "train", "--options.corridor=4", "--model.hidden_size=8", "--algorithm=sac", "--copies=2", "--steps=600",
    "--sac.batch_episodes=4", "--sac.heads=[8]", "--evaluate-every=200", "--episodes=2",
]  # fmt: skip


def start(folder, command=COMMAND):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "hqlt", *command, f"--folder={folder}"],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def wait_for_steps(process, folder, steps):
    """Until the run has told of so many steps."""
    metrics = folder / "metrics.jsonl"
    while process.poll() is None:
        whole = metrics.read_text().splitlines()[:-1] if metrics.exists() else []
        if whole and json.loads(whole[-1])["step"] >= steps:
            return
        time.sleep(0.02)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One run that was never stopped, by each algorithm."""
    folders = {}
    for name, command in (("ppo", COMMAND), ("sac", SAC)):
        folders[name] = tmp_path_factory.mktemp("rl") / name
        process = start(folders[name], command)
        said = process.communicate()[0]
        assert process.returncode == 0, said
    return folders


@pytest.mark.parametrize(("name", "command", "at"), [("ppo", COMMAND, (500, 2500)), ("sac", SAC, (250, 450))])
def test_killed_and_stopped_it_ends_as_if_nothing_had_happened(finished, tmp_path, name, command, at):
    for number, steps in zip((signal.SIGKILL, signal.SIGINT), at, strict=True):
        process = start(tmp_path, command)
        wait_for_steps(process, tmp_path, steps)
        process.send_signal(number)
        said = process.communicate()[0]
        assert process.returncode in ({-9} if number == signal.SIGKILL else {130, 0}), said
        if process.returncode == 130:
            assert "stopped; the same command goes on from step-" in said
    process = start(tmp_path, command)
    said = process.communicate()[0]
    assert process.returncode == 0, said
    assert (tmp_path / "metrics.jsonl").read_text() == (finished[name] / "metrics.jsonl").read_text()
    assert (tmp_path / "agent.safetensors").read_bytes() == (finished[name] / "agent.safetensors").read_bytes()


def test_what_is_left(finished):
    folder = finished["ppo"]
    results = json.loads((folder / "results.json").read_text())
    assert results["test_episodes"] == 4
    assert results["run"]["settings"]["options"] == {"corridor": 6}
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())][-1] == f"step-{results['steps']:09d}"
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "| synchronous | TMazePassive |" in (folder / "README.md").read_text()
    with Image.open(folder / "episode.gif") as gif:
        assert gif.n_frames == 8  # six steps to the junction, one into an arm, and the beginning


def test_a_film_shows_what_was_played_and_which_memory_spoke(finished):
    trainer = load_agent(finished["ppo"])
    one = film(trainer, seed=3)
    assert len(one.frames) == 8
    assert one.rewards.shape == (7,)
    assert one.shares.gate.shape == one.shares.fw.shape == (1, 1, 7)
    assert 0 <= one.shares.fw.min() <= one.shares.fw.max() <= 1
    played = trainer.score(1, seed=3).outcomes[0]
    assert played.total == pytest.approx(float(np.sum(one.rewards, dtype=np.float64)))


def test_it_plays_again(finished, capsys, tmp_path):
    main(["rl", "play", str(finished["ppo"]), "--episodes=3", '--options={"corridor": 9}', f"--film={tmp_path}"])
    assert "3 episodes: return" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"episode.png", "episode.gif"}
    with pytest.raises(SystemExit, match=r"expected the folder of a finished `hqlt rl train`"):
        main(["rl", "play", str(tmp_path)])


def test_any_environment_and_a_memory_that_cannot_be_told_apart(tmp_path, capsys):
    main(
        [
            "rl", "train", "--world=CartPole-v1", "--memory=lstm", "--copies=4", "--steps=200", "--episodes=2",
            "--evaluate-every=100", "--ppo.rollout=20", f"--folder={tmp_path}",
        ]
    )  # fmt: skip
    assert "lstm" in capsys.readouterr().out
    assert json.loads((tmp_path / "results.json").read_text())["test_success"] is None
    assert (tmp_path / "episode.png").exists()


def test_another_run_or_a_damaged_checkpoint_is_refused_and_left_alone(finished, tmp_path):
    shutil.copytree(finished["sac"], tmp_path / "run")
    command = [*SAC, f"--folder={tmp_path / 'run'}"]
    with pytest.raises(SystemExit, match=r"options: expected \{'corridor': 4\}, as .* was trained with"):
        main([*command, "--options.corridor=5"])
    place = AgentCheckpoints(tmp_path / "run" / "checkpoints", 1).newest()
    damaged = place / "replay.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(SystemExit, match=rf"expected a whole checkpoint: .*remove {place.name} to go on"):
        main(command)
    assert place.exists()
    with pytest.raises(SystemExit):
        main([*SAC[:2], "--sac.temprature=1"])


def test_a_full_disk_leaves_the_checkpoints_from_before(settings, tmp_path, monkeypatch):
    trainer, checkpoints = AgentTrainer(settings), AgentCheckpoints(tmp_path, keep=2)
    checkpoints.save(trainer)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hqlt.train.agent.checkpoints.save_file", full)
    with pytest.raises(OSError, match=r"No space left on device.*checkpoints from before are whole"):
        checkpoints.save(trainer)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000000"]


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["rl", "train"], how_to_install("rl")),
        (["reproduce", "visual-match"], how_to_install("rl")),
        (["--version"], hqlt.__version__),
    ],
)
def test_without_gymnasium_the_other_commands_work(command, said):
    code = f"import sys; sys.modules['gymnasium'] = None; from hqlt.cli import main; main({command})"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert said in process.stdout + process.stderr
    assert "Traceback" not in process.stderr


def test_the_setting_in_configs_is_read(tmp_path):
    config = Path(__file__).parents[3] / "configs" / "visual-match.yaml"
    main(["rl", "train", f"--config={config}", "--steps=5000", f"--folder={tmp_path}"])
    settings = json.loads((tmp_path / "config.json").read_text())["settings"]
    assert (settings["world"], settings["options"]["distractor"], settings["ppo"]["rollout"]) == ("VisualMatch", 60, 81)
    assert settings["ppo"]["advantages"] == "raw"
    assert settings["ppo"]["trace"] == 0.95
