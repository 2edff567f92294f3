"""`hqlt rl train` from the command line: killed, stopped and resumed; and the files that it writes."""

import dataclasses
import errno
import json
import math
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
from hqlt.agent import PPO
from hqlt.cli import main
from hqlt.errors import how_to_install
from hqlt.report.episode import film
from hqlt.run_folder import run_folder
from hqlt.train.agent import AgentSettings, AgentTrainer
from hqlt.train.agent.run import load_agent, save_agent
from hqlt.train.checkpoints import Checkpoints

COMMAND = [
    "rl", "train", "--options.corridor=6", "--model.hidden_size=8", "--num-envs=8", "--steps=6000",
    "--ppo.rollout-steps=10", "--evaluate-every=800", "--episodes=4",
]  # fmt: skip
SAC = [
    "rl", "train", "--options.corridor=4", "--model.hidden_size=8", "--algorithm=sac", "--num-envs=2", "--steps=600",
    "--sac.batch_episodes=4", "--sac.hidden-sizes=[8]", "--evaluate-every=200", "--episodes=2",
]  # fmt: skip


def start(folder, command=COMMAND):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "hqlt", *command, f"--folder={folder}"],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def newest(folder):
    return Checkpoints(folder / "checkpoints", 1).newest()


def wait_for_steps(process, folder, steps):
    """Wait until the run has logged this many steps."""
    metrics = folder / "metrics.jsonl"
    while process.poll() is None:
        whole = metrics.read_text().splitlines()[:-1] if metrics.exists() else []
        if whole and json.loads(whole[-1])["step"] >= steps:
            return
        time.sleep(0.02)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted run of each algorithm."""
    folders = {}
    for name, command in (("ppo", COMMAND), ("sac", SAC)):
        folders[name] = tmp_path_factory.mktemp("rl") / name
        process = start(folders[name], command)
        message = process.communicate()[0]
        assert process.returncode == 0, message
    return folders


@pytest.mark.parametrize(("name", "command", "at"), [("ppo", COMMAND, (500, 2500)), ("sac", SAC, (250, 450))])
def test_a_killed_and_stopped_run_ends_like_an_uninterrupted_one(finished, tmp_path, name, command, at):
    for number, steps in zip((signal.SIGKILL, signal.SIGINT), at, strict=True):
        process = start(tmp_path, command)
        wait_for_steps(process, tmp_path, steps)
        process.send_signal(number)
        message = process.communicate()[0]
        assert process.returncode == (-9 if number == signal.SIGKILL else 130), message
        if process.returncode == 130:
            assert "stopped and saved after step " in message
            saved = json.loads((newest(tmp_path) / "trainer.json").read_text())["step"]
            assert saved >= steps, "no logged step is lost"
    process = start(tmp_path, command)
    message = process.communicate()[0]
    assert process.returncode == 0, message
    assert (tmp_path / "metrics.jsonl").read_text() == (finished[name] / "metrics.jsonl").read_text()
    assert (tmp_path / "agent.safetensors").read_bytes() == (finished[name] / "agent.safetensors").read_bytes()


SLOW = [
    "rl", "train", "--env=tests.train.agent.conftest:hqlt-tests/Slow-v0", "--num-envs=1", "--steps=40",
    "--evaluate-every=20", "--ppo.rollout-steps=5", "--model.hidden_size=8", "--episodes=4", "--options.after=25",
]  # fmt: skip


def wait_for_the_evaluation(process, folder):
    """Wait for the evaluation at step 20, whose line is logged at its end."""
    wait_for_steps(process, folder, 10)
    time.sleep(1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_during_an_evaluation_stops_and_saves(tmp_path, number):
    command = [*SLOW, "--options.seconds=0.1"]
    process = start(tmp_path, command)
    wait_for_the_evaluation(process, tmp_path)
    process.send_signal(number)
    message = process.communicate()[0]
    assert process.returncode == 128 + number, message
    (place,) = (tmp_path / "checkpoints").iterdir()
    told = json.loads((place / "trainer.json").read_text())
    assert f"stopped and saved after step {told['step']}; run the same command again to resume" in message
    assert 20 <= told["unscored"]["step"] == told["step"] < 25 and told["best_score"] is None
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert 10 <= lines[-1]["step"] < 20


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_second_signal_exits_immediately(tmp_path, number):
    process = start(tmp_path, [*SLOW, "--options.seconds=600"])
    wait_for_the_evaluation(process, tmp_path)
    process.send_signal(number)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.send_signal(number)
    message = process.communicate(timeout=60)[0]
    assert process.returncode == {signal.SIGTERM: -signal.SIGTERM, signal.SIGINT: 130}[number], message
    assert "Traceback" not in message


def no_permission(folder):
    raise PermissionError(errno.EACCES, "Permission denied", str(folder))


def refused(command):
    """Return the error message of a command that is refused."""
    with pytest.raises(SystemExit) as caught:
        main(command)
    assert isinstance(caught.value.code, str), caught.value.code
    return caught.value.code


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--ppo.rollout-steps=0", "--ppo.rollout-steps: expected a whole number of at least 1, got 0"),
        ("--ppo.learning_rate=-1", "--ppo.learning-rate: expected a number above 0, got -1"),
        ("--ppo.max-grad-norm=-1", "--ppo.max-grad-norm: expected a number above 0, got -1"),
        ("--sac.batch-episodes=0", "--sac.batch-episodes: expected a whole number of at least 1, got 0"),
        ("--sac.gamma=1.5", "--sac.gamma: expected a number from 0 to 1, got 1.5"),
        ("--num-envs=0", "num_envs: expected a whole number of at least 1, got 0"),
        ("--options.coridor=3", "did you mean 'corridor'?"),
        ("--model.windw=3", "did you mean 'window'?"),
        ("--env=TMazePasive", "did you mean 'TMazePassive'?"),
        ("--memory=synchronus", "did you mean 'synchronous'?"),
        ("--env=no_such_module:X-v0", "no_such_module"),
        ("--device=cuda:99", "device: expected one that torch can use here"),
    ],
)
def test_invalid_options_are_refused_before_a_folder_is_made(tmp_path, option, message):
    assert message in refused(["rl", "train", option, f"--folder={tmp_path / 'runs' / 'x'}"])
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("observation", "hqlt-tests/Broken-v0, env 0, step 3 of its episode: observation[0]: expected finite numbers"),
        ("reward", "hqlt-tests/Broken-v0, env 0, step 3 of its episode: reward: expected a finite number, got inf"),
        ("shape", "hqlt-tests/Broken-v0: step() raised ValueError: "),
        ("exception", "hqlt-tests/Broken-v0: step() raised KeyError: 'door' (" + str(Path(__file__).parent)),
    ],
)
@pytest.mark.parametrize("algorithm", ["ppo", "sac"])
def test_a_faulty_environment_is_named(tmp_path, fault, message, algorithm):
    env = "--env=tests.train.agent.conftest:hqlt-tests/Broken-v0"
    options = [f"--options.fault={fault}", "--num-envs=2", f"--algorithm={algorithm}", f"--folder={tmp_path}"]
    assert message in refused(["rl", "train", env, *options])


def test_divergence_is_reported(tmp_path, capsys, monkeypatch):
    """The report uses the best weights; the command fails."""
    monkeypatch.setattr(PPO, "update_weights", lambda agent, loss, max_grad_norm: agent.left_out.add_(1) and math.nan)
    message = refused([*COMMAND, "--steps=800", f"--folder={tmp_path}"])
    assert "training diverged: gradient was not finite at step 8" in message and "--ppo.learning_rate" in message
    assert (tmp_path / "report.html").exists()


def test_a_run_of_another_kind_and_a_folder_of_other_files_are_refused(tmp_path):
    for kind, command in (("language", "hqlt train"), ("study", "hqlt demo or hqlt reproduce")):
        with run_folder(tmp_path / kind, kind):
            (tmp_path / kind / "config.json").touch()
        message = f"expected a run of hqlt rl train, found one of {command}"
        assert message in refused([*COMMAND, f"--folder={tmp_path / kind}"])
        assert message in refused(["rl", "play", str(tmp_path / kind)])
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").touch()
    assert "found other files" in refused([*COMMAND, f"--folder={tmp_path / 'photos'}"])
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["one.jpg"]


def test_two_commands_do_not_train_in_one_folder(tmp_path):
    with run_folder(tmp_path, "agent"):
        assert "another process is using this folder" in refused([*COMMAND, f"--folder={tmp_path}"])


def test_invalid_options_of_play_are_refused_first(finished, tmp_path, monkeypatch):
    folder = str(finished["ppo"])
    monkeypatch.setattr(AgentTrainer, "evaluate", lambda *arguments: pytest.fail("played"))
    assert "--episodes: expected a whole number of at least 1, got 0" in refused(["rl", "play", folder, "--episodes=0"])
    assert "--seed: expected a whole number" in refused(["rl", "play", folder, "--seed=-1"])
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        assert f"{place}: " in refused(["rl", "play", folder, f"--film={place}"])
    with monkeypatch.context() as closed:
        closed.setattr("hqlt.disk.check_folder_writable", no_permission)
        assert "cannot be written there" in refused(["rl", "play", folder, f"--film={tmp_path / 'new'}"])
    assert "config.json: No such file" in refused(["rl", "play", str(tmp_path / "nowhere")])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_damaged_agent_is_reported(finished, tmp_path):
    for name in ("config.json", "agent.safetensors"):
        folder = tmp_path / name
        shutil.copytree(finished["ppo"], folder)
        damaged = folder / name
        damaged.write_bytes(damaged.read_bytes()[:100])
        assert f"{folder}: expected the folder of a finished `hqlt rl train`: " in refused(["rl", "play", str(folder)])


def test_environments_with_other_observations_are_refused(tmp_path):
    trainer = AgentTrainer(AgentSettings(model={"hidden_size": 8}, num_envs=2))
    save_agent(trainer, tmp_path)
    assert "did you mean 'corridor'" in refused(["rl", "play", str(tmp_path), '--options={"coridor": 9}'])
    played = load_agent(tmp_path)
    played.settings = dataclasses.replace(played.settings, env="CartPole-v1")
    with pytest.raises(
        ValueError, match=r"observation: expected shape \[..., 2\], as in the environments for which the"
    ):
        played.evaluate(1, 0)


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_a_package_missing_for_the_report_is_reported_before_training(tmp_path, package):
    code = f"import sys; sys.modules['{package}'] = None; from hqlt.cli import main; main({[*COMMAND]})"
    process = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert f"expected the package {package}; pip install " in process.stderr
    assert process.returncode == 1 and not any(tmp_path.iterdir())


def test_files_of_a_run(finished):
    folder = finished["ppo"]
    results = json.loads((folder / "results.json").read_text())
    assert results["test_episodes"] == 4
    assert results["run"]["settings"]["options"] == {"corridor": 6}
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())][-1] == f"step-{results['steps']:08d}"
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 8 and page.count("data:image/gif;base64,") == 1
    readme = (folder / "README.md").read_text()
    assert "| synchronous | TMazePassive |" in readme and "(episode.gif)" in readme
    with Image.open(folder / "episode.gif") as gif:
        assert gif.n_frames == 8  # the start, six steps to the junction, one into an arm


def test_a_film_holds_frames_rewards_and_shares(finished):
    trainer = load_agent(finished["ppo"])
    one = film(trainer, seed=3)
    assert len(one.frames) == 8
    assert one.rewards.shape == (7,)
    assert one.shares.gate.shape == one.shares.fw.shape == (1, 1, 7)
    assert 0 <= one.shares.fw.min() <= one.shares.fw.max() <= 1
    played = trainer.evaluate(1, seed=3).outcomes[0]
    assert played.total == pytest.approx(float(np.sum(one.rewards, dtype=np.float64)))


def test_a_trained_agent_plays(finished, capsys, tmp_path):
    main(["rl", "play", str(finished["ppo"]), "--episodes=3", '--options={"corridor": 9}', f"--film={tmp_path}"])
    assert "3 episodes: return" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"episode.png", "episode.gif"}
    main(["rl", "play", str(finished["ppo"]), "--episodes=1", "--retention=surprise", "--kept=2"])
    assert "retention surprise in 1 of 1 layers: 4 recent + 2 kept per KV head" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"expected the folder of a finished `hqlt rl train`"):
        main(["rl", "play", str(tmp_path)])


def test_a_gymnasium_environment_and_a_model_without_shares(tmp_path, capsys):
    main(
        [
            "rl", "train", "--env=CartPole-v1", "--memory=lstm", "--num-envs=4", "--steps=200", "--episodes=2",
            "--evaluate-every=100", "--ppo.rollout-steps=20", f"--folder={tmp_path}",
        ]
    )  # fmt: skip
    assert "lstm" in capsys.readouterr().out
    assert json.loads((tmp_path / "results.json").read_text())["test_success"] is None
    assert (tmp_path / "episode.png").exists()


def test_another_run_and_a_damaged_checkpoint_are_refused_and_kept(finished, tmp_path):
    shutil.copytree(finished["sac"], tmp_path / "run")
    command = [*SAC, f"--folder={tmp_path / 'run'}"]
    with pytest.raises(SystemExit, match=r"belongs to a run with another options.corridor: expected 4, got 5"):
        main([*command, "--options.corridor=5"])
    place = newest(tmp_path / "run")
    damaged = place / "tensors.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(SystemExit, match=rf"could not be read .*remove {place.name} to resume"):
        main(command)
    assert place.exists()
    with pytest.raises(SystemExit):
        main([*SAC[:2], "--sac.gama=1"])


def test_a_full_disk_keeps_earlier_checkpoints(settings, tmp_path, monkeypatch):
    trainer = AgentTrainer(settings, folder=tmp_path)
    trainer.save()
    trainer.best_step = 1

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hqlt.train.checkpoints.save_file", full)
    with pytest.raises(OSError, match=r"No space left on device.*step-00000000 is intact"):
        trainer.save()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000000"]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["rl", "train"], how_to_install("rl")),
        (["reproduce", "visual-match"], how_to_install("rl")),
        (["--version"], hqlt.__version__),
    ],
)
def test_without_gymnasium_the_other_commands_work(command, message):
    code = f"import sys; sys.modules['gymnasium'] = None; from hqlt.cli import main; main({command})"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert message in process.stdout + process.stderr
    assert "Traceback" not in process.stderr


def test_a_bundled_config_is_found_by_name(tmp_path):
    main(["rl", "train", "--config=visual-match", "--steps=5000", f"--folder={tmp_path}"])
    settings = json.loads((tmp_path / "config.json").read_text())["settings"]
    assert (settings["env"], settings["options"]["distractor"], settings["ppo"]["rollout_steps"]) == (
        "VisualMatch",
        60,
        81,
    )
    assert settings["ppo"]["advantages"] == "raw"
    assert settings["ppo"]["gae_lambda"] == 0.95
