"""One run of an agent: exact from its checkpoints, scored on episodes of its own, the best weights kept."""

import dataclasses
import math

import pytest
import torch

from hqlt.agent.collect import Evaluation
from hqlt.agent.episode import Outcome
from hqlt.train.agent import AgentSettings, AgentTrainer
from hqlt.train.agent.checkpoints import AgentCheckpoints


def lines(updates):
    return [told.as_line() for told in updates]


def assert_same_agent(one, other):
    for name, tensor in one.tensors().items():
        assert torch.equal(tensor, other.tensors()[name]), name


def test_a_run_goes_on_from_every_checkpoint_as_if_it_had_never_stopped(settings, tmp_path):
    whole = AgentTrainer(settings)
    told, checkpoints = [], AgentCheckpoints(tmp_path, keep=100)
    for update in whole.updates():
        told.append(update.as_line())
        if update.evaluated_return is not None or whole.agent.goes_on_between_rounds:
            checkpoints.save(whole)
    places = sorted(tmp_path.glob("step-*"))
    assert len(places) >= 3
    for place in places[:-1]:
        again = AgentTrainer(settings)
        alone = AgentCheckpoints(tmp_path / "alone" / place.name, keep=1)
        alone.folder.mkdir(parents=True)
        (alone.folder / place.name).symlink_to(place)
        step = alone.resume(again)
        assert step == int(place.name.removeprefix("step-"))
        assert lines(again.updates()) == [line for line in told if line["step"] > step]
        assert_same_agent(again, whole)
        assert (again.best_step, again.best_score) == (whole.best_step, whole.best_score)


def test_more_steps_begin_as_fewer_did(settings):
    few = lines(AgentTrainer(settings).updates())
    more = lines(AgentTrainer(dataclasses.replace(settings, steps=settings.steps + 80)).updates())
    until = settings.steps // settings.evaluate_every * settings.evaluate_every
    shared = [line for line in few if line["step"] <= until]
    assert shared == more[: len(shared)]


def test_the_best_weights_are_kept_and_tested_and_no_others(settings):
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


def test_where_the_world_tells_no_success_the_return_decides(settings):
    trainer = AgentTrainer(settings)
    trainer.keep_the_best(Evaluation((Outcome(2.0, 1, math.nan),)))
    first = trainer.best
    trainer.keep_the_best(Evaluation((Outcome(1.0, 1, math.nan),)))
    assert trainer.best is first
    trainer.keep_the_best(Evaluation((Outcome(2.0, 1, math.nan),)))
    assert trainer.best is not first


def test_an_evaluation_changes_nothing(settings):
    trainer, undisturbed = AgentTrainer(settings), AgentTrainer(settings)
    trainer.score(5, seed=3)
    assert lines(trainer.updates()) == lines(undisturbed.updates())


def test_a_test_may_be_in_a_world_of_other_options(settings):
    trainer = AgentTrainer(settings)
    for _ in trainer.updates():
        pass
    assert trainer.test(2, corridor=9).mean_length == 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"memory": "lstmm"}, "did you mean 'lstm'"),
        ({"world": "TMazePasive"}, "did you mean 'TMazePassive'"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        AgentTrainer(AgentSettings(**change))
