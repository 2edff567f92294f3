"""The training loop of an agent: exact resume, evaluation on separate episodes, the best weights."""

import contextlib
import dataclasses
import json
import math

import pytest
import torch
from rich.console import Console

from hqlt.agent import PPOSettings
from hqlt.agent.collect import Evaluation
from hqlt.agent.episode import Outcome
from hqlt.report.agent import write_agent_report
from hqlt.signals import Stopped
from hqlt.train.agent import AgentSettings, AgentTrainer, Update
from hqlt.train.agent.settings import TEST_SEED, VALIDATION_SEED
from hqlt.train.metrics import Metrics


def lines(updates):
    return [update.as_line() for update in updates]


def assert_same_agent(one, other):
    for name, tensor in one.tensors().items():
        assert torch.equal(tensor, other.tensors()[name]), name


def test_a_run_resumes_exactly_from_every_checkpoint(settings, tmp_path):
    whole, expected = AgentTrainer(dataclasses.replace(settings, keep_checkpoints=100), folder=tmp_path), []
    for update in whole.updates():
        expected.append(update.as_line())
        whole.save()
    places = whole.checkpoints.finished()
    assert len(places) == len(expected) >= 3
    for place in places[:-1]:
        again = AgentTrainer(settings, folder=tmp_path / "alone" / place.name)
        again.checkpoints.folder.mkdir(parents=True)
        (again.checkpoints.folder / place.name).symlink_to(place)
        step = again.resume()
        assert step == int(place.name.removeprefix("step-"))
        assert lines(again.updates()) == [line for line in expected if line["step"] > step]
        assert_same_agent(again, whole)
        assert (again.best_step, again.best_score) == (whole.best_step, whole.best_score)


class StoppedAt(list):
    """A list of signals that is empty for the first `checks` checks, as if a signal arrived then."""

    def __init__(self, checks):
        super().__init__([2])
        self.checks = checks

    def __bool__(self):
        self.checks -= 1
        return self.checks < 0


@pytest.mark.parametrize("checks", [5, 17, 22, 23, 40, 50])
def test_a_run_stopped_anywhere_ends_like_an_uninterrupted_one(settings, tmp_path, checks):
    """During a collection, which is then lost, or during an evaluation."""
    whole = AgentTrainer(settings)
    expected = lines(whole.updates())
    trainer, got = AgentTrainer(settings, folder=tmp_path), []
    trainer.signals = StoppedAt(checks)
    with contextlib.suppress(Stopped):
        for update in trainer.train():
            got.append(update.as_line())
    assert trainer.step < settings.steps
    trainer.save()
    again = AgentTrainer(settings, folder=tmp_path)
    assert again.resume() == trainer.step
    assert got + lines(again.updates()) == expected
    assert again.pending is None
    assert_same_agent(again, whole)


def test_a_stop_during_an_evaluation_loses_no_training(settings, tmp_path):
    trainer = AgentTrainer(settings, folder=tmp_path)
    evaluate, trainer.evaluate = (
        trainer.evaluate,
        lambda *arguments: setattr(trainer, "signals", [2]) or evaluate(*arguments),
    )
    with pytest.raises(Stopped):
        list(trainer.updates())
    assert trainer.step >= settings.evaluate_every and trainer.pending.step == trainer.step
    trainer.save()
    again = AgentTrainer(settings, folder=tmp_path)
    assert again.resume() == trainer.step == again.last_logged_step + 1
    assert next(again.updates()).step == trainer.step


def test_a_longer_run_starts_like_a_shorter_one(settings):
    few = lines(AgentTrainer(settings).updates())
    more = lines(AgentTrainer(dataclasses.replace(settings, steps=settings.steps + 80)).updates())
    until = settings.steps // settings.evaluate_every * settings.evaluate_every
    shared = [line for line in few if line["step"] <= until]
    assert shared == more[: len(shared)]


def test_the_best_weights_are_tested(settings):
    trainer = AgentTrainer(settings)
    scores = []
    for update in trainer.updates():
        if update.evaluated_return is not None:
            weights = {name: weight.clone() for name, weight in trainer.agent.state_dict().items()}
            scores.append(((update.evaluated_success, update.evaluated_return), update.step, weights))
    best = max(score for score, _, _ in scores)
    step, weights = [(step, weights) for score, step, weights in scores if score == best][-1]
    tested = trainer.test(6)
    assert trainer.best_step == step
    assert len(tested.outcomes) == 6
    for name, weight in trainer.agent.state_dict().items():
        assert torch.equal(weight, weights[name]), name


def test_without_success_the_return_decides(settings):
    trainer = AgentTrainer(settings)
    trainer.update_best(Evaluation((Outcome(2.0, 1, math.nan),)))
    first = trainer.best
    trainer.update_best(Evaluation((Outcome(1.0, 1, math.nan),)))
    assert trainer.best is first
    trainer.update_best(Evaluation((Outcome(2.0, 1, math.nan),)))
    assert trainer.best is not first


def test_results_count_all_steps_if_the_first_weights_were_best(settings, tmp_path):
    trainer = AgentTrainer(settings)
    trainer.update_best(Evaluation((Outcome(1e9, 1, 1.0),)))
    last = list(trainer.updates())[-1]
    tested = trainer.test()
    (tmp_path / "metrics.jsonl").write_text(json.dumps(last.as_line()))
    write_agent_report(trainer, tested, tmp_path, {"parameters": trainer.size}, Console())
    results = json.loads((tmp_path / "results.json").read_text())
    assert (results["best_step"], results["steps"]) == (0, last.step)


def test_evaluations_too_frequent_for_an_episode_are_refused():
    ppo = {"rollout_steps": 8}
    settings = AgentSettings(
        env="KeyToDoor", model={"hidden_size": 8}, num_envs=4, hyperparameters=ppo, evaluate_every=200
    )
    with pytest.raises(ValueError, match=r"evaluate_every: expected more than num_envs \(4\) × the longest episode"):
        list(AgentTrainer(settings).updates())


def test_a_short_last_interval_is_allowed():
    ppo = {"rollout_steps": 8}
    settings = AgentSettings(
        env="KeyToDoor", options={"distractor": 5}, model={"hidden_size": 8}, num_envs=2, hyperparameters=ppo,
        steps=110, evaluate_every=100, episodes=1,
    )  # fmt: skip
    assert list(AgentTrainer(settings).updates())[-1].evaluated_return is not None


def test_a_run_resumes_exactly_in_the_middle_of_episodes(tmp_path):
    """In an environment with more state than a position: eaten apples return."""
    options, model = {"explore": 3, "distractor": 30, "reward": 4}, {"hidden_size": 8, "num_layers": 1, "window": 2}
    settings = AgentSettings(
        env="VisualMatch", options=options, model=model, num_envs=4, steps=900, evaluate_every=300, episodes=2,
        hyperparameters=PPOSettings(rollout_steps=11, hidden_sizes=(8,), num_minibatches=1, epochs=1),
    )  # fmt: skip
    whole, expected = AgentTrainer(settings, folder=tmp_path), []
    for update in whole.updates():
        expected.append(update.as_line())
        if update.evaluated_return is not None and not whole.checkpoints.newest():
            whole.save()
    again = AgentTrainer(settings, folder=tmp_path)
    step = again.resume()
    assert 0 < step < 900
    assert lines(again.updates()) == [line for line in expected if line["step"] > step]


def test_nan_is_written_as_null_and_skipped_updates_are_counted(settings, tmp_path):
    trainer = AgentTrainer(settings)
    trainer.agent.update_weights(trainer.agent.actor[0].weight.sum() * math.nan, 1.0)
    assert trainer.agent.left_out == 1
    json.dumps(dataclasses.asdict(AgentSettings()), allow_nan=False)
    line = Update(1, 0, None, None, None, {"loss": math.nan, "gradient": math.inf}, 1).as_line()
    metrics = Metrics(tmp_path / "metrics.jsonl", 0)
    metrics.write(line)
    metrics.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {**line, "loss": None, "gradient": None}


def test_neighbouring_seeds_give_unrelated_environments(settings):
    seeds = [
        AgentTrainer(dataclasses.replace(settings, seed=seed)).agent.derive_seed(torch.tensor(0)) for seed in (0, 1)
    ]
    assert abs(seeds[0] - seeds[1]) > settings.num_envs
    assert max(seeds) < 2**31 <= VALIDATION_SEED < TEST_SEED


def test_pruning_keeps_complete_checkpoints(settings, tmp_path):
    (tmp_path / "step-00000900.unfinished").mkdir()
    trainer = AgentTrainer(settings, folder=tmp_path)
    trainer.save()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000000"]


def test_an_evaluation_does_not_change_training(settings):
    trainer, undisturbed = AgentTrainer(settings), AgentTrainer(settings)
    trainer.evaluate(5, seed=3)
    assert lines(trainer.updates()) == lines(undisturbed.updates())


def test_a_test_may_use_other_options(settings):
    trainer = AgentTrainer(settings)
    for _ in trainer.updates():
        pass
    length = {"Bell": "wait"}.get(settings.env, "corridor")
    assert trainer.test(2, **{length: 9}).mean_length == 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps: expected a whole number of at least 1, got 0"),
        ({"seed": -1}, "seed: expected a whole number from 0 to"),
        ({"memory": "lstmm"}, "did you mean 'lstm'"),
        ({"env": "TMazePasive"}, "did you mean 'TMazePassive'"),
        ({"options": {"coridor": 3}}, "TMazePassive: options: .*, got 'coridor'; did you mean 'corridor'"),
        ({"options": {"corridor": "x"}}, "TMazePassive: corridor: expected a whole number of at least 1, got 'x'"),
        ({"model": {"windw": 3}}, "model: argument: .*, got 'windw'; did you mean 'window'"),
        ({"model": {"window": 0}}, "model: window: expected a whole number of at least 1, got 0"),
        ({"model": {"beta_max": "x"}}, "model: "),
        ({"env": "CartPole-v1", "options": {"max_epsiode_steps": 9}}, "did you mean 'max_episode_steps'"),
        ({"env": "CartPole-v1", "options": {"max_episode_steps": 0}}, "CartPole-v1: "),
        ({"algorithm": "a2c"}, "algorithm: expected one of"),
        ({"env": "CartPole-v1", "options": {"render_mode": "human"}}, "CartPole-v1: .*pygame"),
    ],
)
def test_invalid_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        AgentTrainer(AgentSettings(**change)).envs.reset()


def test_an_unknown_kind_of_advantages_is_refused():
    with pytest.raises(ValueError, match=r"ppo\.advantages: expected one of 'raw', 'centred', 'standardised'"):
        PPOSettings(advantages="scaled")


@pytest.mark.parametrize("algorithm", ["ppo", "sac"])
def test_an_episode_that_does_not_end_is_an_error(algorithm, monkeypatch):
    """Both in a collection and in a greedy evaluation."""
    monkeypatch.setattr("hqlt.agent.stream.MAX_EPISODE_STEPS", 100)
    env = "tests.train.agent.conftest:hqlt-tests/Waiting-v0"
    settings = AgentSettings(env=env, algorithm=algorithm, num_envs=4, steps=600, evaluate_every=300, episodes=2)
    trainer = AgentTrainer(settings)
    with torch.no_grad():
        trainer.agent.actor[-1].weight.zero_()
        trainer.agent.actor[-1].bias.copy_(torch.tensor([5.0, 0.0]))  # waits, and rarely leaves
    message = (
        r"hqlt-tests/Waiting-v0, env \d, step 100 of its episode: expected an episode to end within 100 .*TimeLimit"
    )
    with pytest.raises(ValueError, match=message):
        list(trainer.updates())
    limited = AgentTrainer(dataclasses.replace(settings, options={"max_episode_steps": 50}))
    limited.agent.load_state_dict(trainer.agent.state_dict())
    assert limited.evaluate(2, seed=0).mean_length == 50


@pytest.mark.parametrize("name", ["tensors.safetensors", "trainer.json"])
@pytest.mark.parametrize("share", [0, 0.3, 0.99])
def test_a_truncated_checkpoint_is_reported(settings, tmp_path, name, share):
    trainer = AgentTrainer(settings, folder=tmp_path)
    next(trainer.updates())
    trainer.save()
    path = trainer.checkpoints.newest() / name
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match=r"(expected a checkpoint|could not be read) .* remove step-"):
        AgentTrainer(settings, folder=tmp_path).resume()


@pytest.mark.parametrize(
    "content", ["[]", "3", "{}", '{"step": 0, "run": 3}', '{"step": 0, "run": {}}', '{"best_score": 1}']
)
def test_a_damaged_description_of_a_checkpoint_is_reported(settings, tmp_path, content):
    trainer = AgentTrainer(settings, folder=tmp_path)
    trainer.save()
    (trainer.checkpoints.newest() / "trainer.json").write_text(content)
    with pytest.raises(ValueError, match="step-00000000"):
        AgentTrainer(settings, folder=tmp_path).resume()


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_an_unavailable_device_is_refused(settings, device):
    with pytest.raises(ValueError, match=f"device: expected one that torch can use here, such as cpu, got '{device}'"):
        AgentTrainer(settings, device)
