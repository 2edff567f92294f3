"""Laws of every environment: gymnasium's API, seeds, independence of parallel environments, frames."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from hypothesis import given
from hypothesis import strategies as st

import tests.toys.agents  # noqa: F401  registers an environment of another package
from hqlt.agent.worlds import KeyToDoor, SingleEnv, TMaze, VisualMatch, make_worlds, register_with_gymnasium
from hqlt.registry import names

register_with_gymnasium()

SHORT = {
    "TMazePassive": {"corridor": 4},
    "TMazeActive": {"corridor": 3},
    "KeyToDoor": {"explore": 5, "distractor": 9, "reward": 4, "respawn": 3, "apple_reward": (1.0, 10.0)},
    "VisualMatch": {"explore": 2, "distractor": 9, "reward": 7, "respawn": 3, "colours": "shuffled"},
    "Bell": {"wait": 6},
}
every_env = pytest.mark.parametrize("name", SHORT)


def make(name: str, n: int, how: str = "vector_entry_point", **options) -> gymnasium.vector.VectorEnv:
    return gymnasium.make_vec(f"hqlt/{name}-v0", n, vectorization_mode=how, **{**SHORT[name], **options})


def equal(some, others) -> None:
    assert type(some) is type(others)
    if isinstance(some, dict):
        assert some.keys() == others.keys()
        some, others = some.values(), others.values()
    elif not isinstance(some, tuple):
        assert some.dtype == others.dtype and (some == others).all()
        return
    for a, b in zip(some, others, strict=True):
        equal(a, b)


@every_env
def test_gymnasiums_checker_passes(name):
    environment = gymnasium.make(f"hqlt/{name}-v0", render_mode="rgb_array")
    assert isinstance(environment.unwrapped, SingleEnv)
    check_env(environment.unwrapped)
    envs = gymnasium.make_vec(f"hqlt/{name}-v0", num_envs=3)
    assert envs.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    assert (envs.num_envs, envs.action_space.shape) == (3, (3,))
    seen, _ = envs.reset(seed=0)
    assert seen in envs.observation_space and seen[0] in envs.single_observation_space


@every_env
@given(n=st.integers(1, 5), seed=st.integers(0, 2**70), data=st.data())
def test_parallel_environments_equal_single_ones(name, n, seed, data):
    """n in parallel equal n single ones that gymnasium steps one by one, across ends and partial resets."""
    together, alone = make(name, n), make(name, n, "sync")
    equal(together.reset(seed=seed), alone.reset(seed=seed))
    rng = np.random.default_rng(seed)
    for _ in range(60):
        if rng.random() < 0.1:
            mask = rng.random(n) < 0.5
            mask[data.draw(st.integers(0, n - 1))] = True
            again = None if rng.random() < 0.5 else int(rng.integers(9))
            equal(*(envs.reset(seed=again, options={"reset_mask": mask}) for envs in (together, alone)))
        actions = rng.integers(4, size=n)
        equal(together.step(actions), alone.step(actions))


@every_env
def test_episodes_do_not_depend_on_the_number_of_environments(name):
    few, many, later = make(name, 2), make(name, 50), make(name, 3)
    rng = np.random.default_rng(0)
    seen = [few.reset(seed=7)[0], many.reset(seed=7)[0][:2], later.reset(seed=6)[0][1:]]
    for _ in range(60):
        assert (seen[0] == seen[1]).all() and (seen[0] == seen[2]).all()
        actions = rng.integers(4, size=50)
        seen = [few.step(actions[:2])[0], many.step(actions)[0][:2], later.step(actions[[2, 0, 1]])[0][1:]]


@every_env
def test_seeds(name):
    def episodes(envs, seed):
        rng = np.random.default_rng(0)
        seen = [envs.reset(seed=seed)[0], envs.reset()[0]]
        return np.stack(seen + [envs.step(rng.integers(4, size=40))[0] for _ in range(40)])

    envs = make(name, 40)
    first = episodes(envs, 1)
    assert (episodes(envs, 1) == first).all()
    assert (episodes(make(name, 40), 1) == first).all()
    assert (episodes(envs, 2) != first).any()
    unseeded = make(name, 40), make(name, 40)
    assert (episodes(unseeded[0], None) != episodes(unseeded[1], None)).any()


@every_env
def test_the_step_after_the_last_is_a_reset(name):
    envs = make(name, 3)
    length = envs.episode_length
    envs.reset(seed=0)
    for step in range(1, 3 * (length + 1)):
        _, rewards, ended, cut, info = envs.step(np.full(3, step % 4))
        assert (ended == (step % (length + 1) == length)).all() and not cut.any()
        assert ("success" in info) == ended.all()
        if step % (length + 1) == 0:
            assert (rewards == 0).all()


@every_env
def test_returned_arrays_do_not_change_later(name):
    envs = make(name, 3)
    kept = [envs.reset(seed=0)[0]]
    copies = [kept[0].copy()]
    for _ in range(30):
        seen, rewards, ended, cut, _ = envs.step(np.array([3, 0, 2]))
        kept += [seen, rewards, ended, cut]
        copies += [array.copy() for array in (seen, rewards, ended, cut)]
    assert all((a == b).all() for a, b in zip(kept, copies, strict=True))


@every_env
def test_frames(name):
    envs = make(name, 3, render_mode="rgb_array")
    envs.reset(seed=0)
    frames = envs.render()
    assert len(frames) == 3 and {(frame.shape, str(frame.dtype)) for frame in frames} == {(frames[0].shape, "uint8")}
    assert (frames[0] != frames[1]).any() or (frames[1] != frames[2]).any()  # frames also show what is hidden
    for _ in range(2):  # afterwards no agent is enclosed
        envs.step(np.array([2, 3, 1]))
    assert any((a != b).any() for a, b in zip(frames, envs.render(), strict=True))
    one = gymnasium.make(f"hqlt/{name}-v0", render_mode="rgb_array", **SHORT[name])
    one.reset(seed=0)
    assert (one.render() == frames[0]).all()
    assert make(name, 3).render() is None


def test_invalid_calls_are_refused():
    envs = TMaze(2)
    with pytest.raises(ResetNeeded, match=r"reset\(\) before the first step"):
        envs.step(np.zeros(2, int))
    envs.reset(seed=0)
    with pytest.raises(ValueError, match="expected 2 whole numbers, got int64 \\(3,\\)"):
        envs.step(np.zeros(3, int))
    with pytest.raises(ValueError, match="expected 2 whole numbers, got float64"):
        envs.step(np.zeros(2))
    for wrong in (-1, 4):
        with pytest.raises(ValueError, match="up, down, left, right"):
            envs.step(np.array([0, wrong]))
    for step in range(1, 12):  # refused steps do not count
        assert envs.step(np.zeros(2, int))[2].all() == (step == 11)
    envs.reset()
    for mask in (np.zeros(2, bool), np.ones(3, bool), np.ones(2, int)):
        with pytest.raises(ValueError, match=r"reset_mask: expected bool \[2\]"):
            envs.reset(options={"reset_mask": mask})
    one = gymnasium.make("hqlt/TMazePassive-v0", corridor=1).unwrapped
    with pytest.raises(ResetNeeded):
        one.step(0)
    one.reset(seed=0)
    one.step(0)
    one.step(0)
    with pytest.raises(ResetNeeded):
        one.step(0)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TMaze(0), "num_envs: expected a whole number of at least 1"),
        (lambda: TMaze(corridor=0), "corridor: expected a whole number of at least 1"),
        (lambda: TMaze(oracle=-1), "oracle: expected a whole number of at least 0"),
        (lambda: TMaze(render_mode="human"), "render_mode: expected None or 'rgb_array', got 'human'"),
        (lambda: KeyToDoor(apples=23), "apples: expected a whole number from 0 to 22, got 23"),
        (lambda: KeyToDoor(explore=0), "explore: expected a whole number of at least 1"),
        (lambda: KeyToDoor(respawn=-1), "respawn: expected a whole number of at least 0"),
        (lambda: VisualMatch(reward=0), "reward: expected a whole number of at least 1"),
        (lambda: VisualMatch(distractor=-1), "distractor: expected a whole number of at least 0"),
        (lambda: TMaze(corridor="x"), "corridor: expected a whole number of at least 1, got 'x'"),
        (lambda: TMaze(corridor=2.5), "corridor: expected a whole number of at least 1, got 2.5"),
        (lambda: VisualMatch(colours="rgy"), "colours: expected 'shuffled' or r, g and b in some order, got 'rgy'"),
    ],
)
def test_invalid_arguments_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_an_environment_takes_few_bytes():
    envs = make_worlds("VisualMatch", 1, 0)
    state = sum(array.nbytes for array in vars(envs).values() if isinstance(array, np.ndarray))
    assert state < 300


@pytest.mark.parametrize("name", names("world"))
def test_a_reset_leaves_nothing_of_the_episode_before(name):
    envs, fresh, draw = make_worlds(name, 32, seed=0), make_worlds(name, 32, seed=1), np.random.default_rng(0)
    envs.reset(seed=3)
    for _ in range(40):
        envs.step(draw.integers(4, size=32))
    assert (envs.reset(seed=7)[0] == fresh.reset(seed=7)[0]).all()
    for _ in range(60):
        actions = draw.integers(4, size=32)
        (seen, rewards, *_), (seen_there, rewards_there, *_) = envs.step(actions), fresh.step(actions)
        assert (seen == seen_there).all()
        assert (rewards == rewards_there).all()
