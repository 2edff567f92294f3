"""Streams of steps in gymnasium's three autoreset modes, compared with values worked out by hand."""

from __future__ import annotations

import itertools

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorWrapper
from gymnasium.wrappers import TimeLimit

from hqlt.agent import PPO, SAC, build_memory
from hqlt.agent.stream import Stream
from hqlt.agent.worlds import make_worlds
from tests.agent.toy_envs import Counter, Cue, DictCue, sync_envs

MODES = list(AutoresetMode)


def counters(mode):
    """Two environments, with episodes of three steps and two."""
    lengths = iter((3, 2))
    return sync_envs(lambda: Counter(next(lengths)), 2, mode)


def run(mode, steps):
    stream = Stream(counters(mode))
    return stream.reset(), [stream.step(np.array([0, 2])) for _ in range(steps)]


def test_reset_at_the_next_step():
    begun, steps = run(AutoresetMode.NEXT_STEP, 5)
    assert begun.tolist() == [100, 100]
    assert [step.observation.tolist() for step in steps] == [[101, 101], [102, 102], [103, 200], [200, 201], [201, 202]]
    assert all((step.successor == step.observation).all() for step in steps)
    assert [step.first.tolist() for step in steps] == [[0, 0], [0, 0], [0, 1], [1, 0], [0, 0]]
    assert [step.live.tolist() for step in steps] == [[1, 1], [1, 1], [1, 0], [0, 1], [1, 1]]
    assert [step.truncated.tolist() for step in steps] == [[0, 0], [0, 1], [1, 0], [0, 0], [0, 1]]
    assert [step.reward.tolist() for step in steps] == [[0, 2], [0, 2], [0, 0], [0, 2], [0, 2]]


@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.DISABLED])
def test_reset_in_the_same_step(mode):
    begun, steps = run(mode, 4)
    assert begun.tolist() == [100, 100]
    assert [step.successor.tolist() for step in steps] == [[101, 101], [102, 102], [103, 201], [201, 202]]
    assert [step.observation.tolist() for step in steps] == [[101, 101], [102, 200], [200, 201], [201, 300]]
    assert [step.first.tolist() for step in steps] == [[0, 0], [0, 1], [1, 0], [0, 1]]
    assert all(step.live.all() for step in steps)
    assert [step.truncated.tolist() for step in steps] == [[0, 0], [0, 1], [1, 0], [0, 1]]


@pytest.mark.parametrize("mode", MODES)
def test_success_is_reported_at_the_end_of_an_episode(mode):
    stream = Stream(sync_envs(lambda: Cue((2, 2)), 3, mode))
    cue = (stream.reset(seed=0)[:, 0] > 0).astype(int)
    assert np.isnan(stream.step(cue).success).all()
    cue[0] = 1 - cue[0]
    last = stream.step(cue)
    assert last.success.tolist() == [0, 1, 1]
    assert last.terminated.all() and not last.truncated.any()
    assert np.isnan(stream.step(cue).success).all()


@pytest.mark.parametrize("mode", [None, "sometimes"])
def test_environments_without_an_autoreset_mode_are_refused(mode):
    envs = sync_envs(Cue, 1)
    envs.metadata["autoreset_mode"] = mode
    with pytest.raises(ValueError, match=rf"metadata\['autoreset_mode'\], .*, got {mode!r}"):
        Stream(envs)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("vector", [SyncVectorEnv, AsyncVectorEnv])
def test_last_observations_of_dictionaries_and_tuples(mode, vector):
    """In every mode `successor` holds the last observation of an episode and `observation` the first of the next."""
    envs = vector([lambda: DictCue((2, 2))] * 3, autoreset_mode=mode)
    stream = Stream(envs)
    seen = stream.reset(seed=1)
    assert seen["image"].dtype == np.uint8 and seen["image"].shape == (3, 3, 4, 4)
    assert seen["rest"][1].shape == (3, 2) and seen["image"].any()
    stream.step(np.zeros(3, int))
    last = stream.step(np.zeros(3, int))
    assert last.ended.all()
    assert (last.successor["clock"]["left"] == 0).all() and not last.successor["image"].any()
    if mode is AutoresetMode.NEXT_STEP:
        last = stream.step(np.zeros(3, int))
    assert last.first.all() and (last.observation["clock"]["left"] == [2, 0]).all()
    assert last.observation["image"].any() and not np.shares_memory(last.observation["image"], seen["image"])
    envs.close()


def stepped(stream, steps):
    for _ in range(steps):
        stream.step(np.zeros(2, int))


class Bad(Counter):
    """An environment with a fault in the third step of every second instance."""

    made = itertools.count()

    def __init__(self, fault, length=9):
        super().__init__(length)
        self.fault, self.second = fault, next(self.made) % 2 == 1

    def step(self, action):
        observation, reward, terminated, truncated, info = super().step(action)
        if self.second and self.time == 3:
            observation, reward, info = self.fault(observation, reward, info)
        return observation, reward, terminated, truncated, info


def broken(observation, reward, info):
    raise KeyError("door")


PLACE = "Bad, env 1, step 3 of its episode: "


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda seen, reward, info: (np.nan, reward, info), PLACE + "observation: expected finite numbers, got nan"),
        (lambda seen, reward, info: (-np.inf, reward, info), PLACE + "observation: expected finite numbers, got -inf"),
        (lambda seen, reward, info: (seen, np.nan, info), PLACE + "reward: expected a finite number, got nan"),
        (lambda seen, reward, info: (seen, 1e39, info), PLACE + r"reward: expected a finite number, got 1e\+39"),
        (broken, r"Bad: step\(\) raised KeyError: 'door' \(.*test_stream.py, line \d+\)"),
    ],
)
def test_faults_are_located(mode, fault, message):
    """Errors name the environment, its index and the step, immediately and in every mode."""
    Bad.made = itertools.count()
    stream = Stream(sync_envs(lambda: Bad(fault), 2, mode))
    stream.reset(seed=0)
    with pytest.raises(ValueError, match=message):
        stepped(stream, 5)
    assert stream._length.max() <= 3


def test_a_success_that_is_no_number_is_refused():
    Bad.made = itertools.count()
    stream = Stream(sync_envs(lambda: Bad(lambda seen, reward, info: (seen, reward, {"success": "yes"}), 3), 2))
    stream.reset()
    with pytest.raises(ValueError, match=r"Bad: info\['success'\]: expected booleans or numbers, got .*yes"):
        stepped(stream, 3)


class Loose(VectorWrapper):
    """Replaces one part of the result of a step."""

    def __init__(self, envs, part, value):
        super().__init__(envs)
        self.part, self.value = part, value

    def step(self, actions):
        result = [*super().step(actions)]
        result[self.part] = self.value
        return tuple(result)


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        (0, np.zeros((2, 3)), r"Counter: observation: expected shape \[2\], got \[2, 3\]"),
        (0, np.array(["a", "b"]), "Counter: observation: expected float64, the dtype of its space, got <U1"),
        (1, np.zeros((2, 1)), r"Counter: reward: expected shape \[2\], got \[2, 1\]"),
        (1, ["a", "b"], "Counter: reward: expected numbers"),
        (2, [False], r"Counter: terminated: expected shape \[2\], got \[1\]"),
        (3, False, r"Counter: truncated: expected shape \[2\], got \[\]"),
    ],
)
def test_vector_environments_that_break_the_api_are_refused(part, value, message):
    stream = Stream(Loose(sync_envs(Counter, 2), part, value))
    stream.reset()
    with pytest.raises(ValueError, match=message):
        stream.step(np.zeros(2, int))


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        (np.array([0, 3]), "Counter, env 1, step 0 of its episode: action: expected 0 … 2, got 3"),
        (np.array([-1, 0]), "Counter, env 0, .* action: expected 0 … 2, got -1"),
        (np.zeros(2), r"actions: expected 2 whole numbers, got float64 \[2\]"),
        (np.zeros(3, int), r"actions: expected 2 whole numbers, got int64 \[3\]"),
    ],
)
def test_invalid_actions_are_refused(actions, message):
    stream = Stream(sync_envs(Counter, 2))
    stream.reset()
    with pytest.raises(ValueError, match=message):
        stream.step(actions)


def test_a_missing_final_observation_is_refused():
    stream = Stream(Loose(sync_envs(Counter, 2, AutoresetMode.SAME_STEP), 4, {}))
    stream.reset()
    with pytest.raises(ValueError, match=r"infos: expected 'final_obs' where an episode ended"):
        stepped(stream, 3)


class Forgetful(VectorWrapper):
    """Resets all environments, ignoring the mask."""

    def reset(self, *, seed=None, options=None):
        return super().reset(seed=seed)


def test_environments_that_ignore_the_reset_mask_are_refused():
    lengths = iter((3, 2))
    stream = Stream(Forgetful(sync_envs(lambda: Counter(next(lengths)), 2, AutoresetMode.DISABLED)))
    stream.reset()
    with pytest.raises(ValueError, match="expected environments outside the mask to stay unchanged"):
        stepped(stream, 3)


def endless():
    return Counter(length=10**9)


@pytest.mark.parametrize("mode", MODES)
def test_an_episode_must_end(mode, monkeypatch):
    monkeypatch.setattr("hqlt.agent.stream.MAX_EPISODE_STEPS", 20)
    stream = Stream(sync_envs(endless, 2, mode))
    stream.reset()
    for _ in range(19):
        stream.step(np.zeros(2, int))
    message = (
        r"Counter, env 0, step 20 of its episode: expected an episode to end within 20 steps.*max_episode_steps=1000"
    )
    with pytest.raises(ValueError, match=message):
        stream.step(np.zeros(2, int))
    stream = Stream(sync_envs(lambda: TimeLimit(endless(), 20), 2, mode))  # ends in time
    stream.reset()
    assert sum(stream.step(np.zeros(2, int)).truncated.sum() for _ in range(50)) == 4


def test_environments_may_declare_longer_episodes(monkeypatch):
    monkeypatch.setattr("hqlt.agent.stream.MAX_EPISODE_STEPS", 20)
    assert Stream(gymnasium.make_vec("CartPole-v1", 2, vectorization_mode="sync")).max_episode_steps == 500
    assert Stream(make_worlds("CartPole-v1", 2, 0, max_episode_steps=30)).max_episode_steps == 30
    assert Stream(make_worlds("TMazePassive", 2, 0, corridor=70)).max_episode_steps == 71
    assert Stream(sync_envs(endless, 2)).max_episode_steps == 20


def test_names_of_environments():
    for envs, name in (
        (make_worlds("CartPole-v1", 2, 0), "CartPole-v1"),
        (gymnasium.make_vec("hqlt/TMazePassive-v0", 2), "hqlt/TMazePassive-v0"),
        (make_worlds("TMazePassive", 2, 0), "TMazePassive"),
        (sync_envs(Cue, 2), "Cue"),
    ):
        assert Stream(envs).name == name


@pytest.mark.parametrize("kind", [PPO, SAC, None])
def test_a_single_environment_is_refused_with_advice(kind):
    """By agents and by streams."""
    one = gymnasium.make("CartPole-v1")
    message = r"expected a gymnasium.vector.VectorEnv, got .*; make parallel .* with gymnasium.make_vec\('CartPole-v1'"
    with pytest.raises(ValueError, match=message):
        kind(one, build_memory("none", hidden_size=4)) if kind else Stream(one)
    with pytest.raises(ValueError, match=r"SyncVectorEnv\(\[MyEnv\] \* 8\)"):
        Stream(Cue())
