"""One door: ours by name, others by their ids, and what is said where there is none."""

from __future__ import annotations

import subprocess
import sys

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import SyncVectorEnv, VectorEnv

from hqlt.agent.worlds import TMaze, VisualMatch, make_worlds
from hqlt.errors import how_to_install
from hqlt.registry import find, names


@pytest.mark.parametrize("name", names("world"))
def test_ours_by_name(name):
    worlds = make_worlds(name, 3, seed=5)
    assert type(worlds) is find("world", name) and worlds.num_envs == 3
    again = make_worlds(f"hqlt/{name}-v0", 3, seed=5)
    assert np.array_equal(worlds.reset()[0], again.reset()[0])
    assert np.array_equal(worlds.action_space.sample(), again.action_space.sample())


def test_options_reach_the_world():
    assert make_worlds("TMazePassive", 1, 0).oracle == 0
    assert make_worlds("TMazeActive", 1, 0).oracle == 1
    worlds = make_worlds("TMazeActive", 2, 0, corridor=7, oracle=3)
    assert isinstance(worlds, TMaze) and (worlds.corridor, worlds.oracle) == (7, 3)
    worlds = make_worlds("VisualMatch", 2, 0, distractor=40)
    assert isinstance(worlds, VisualMatch) and worlds.episode_length == 70


def steps(worlds: VectorEnv, count: int) -> np.ndarray:
    seen = [worlds.reset()[0], *(worlds.step(worlds.action_space.sample())[0] for _ in range(count))]
    assert all(observation in worlds.observation_space for observation in seen)
    return np.stack(seen)


@pytest.mark.parametrize("name", ["CartPole-v1", "gymnasium.envs:CartPole-v1"])
def test_any_id_of_gymnasium(name):
    worlds = make_worlds(name, 2, seed=3)
    assert isinstance(worlds, SyncVectorEnv)
    assert np.array_equal(steps(worlds, 30), steps(make_worlds(name, 2, seed=3), 30))


@pytest.mark.parametrize("name", ["popgym-RepeatPreviousEasy-v0", "MiniGrid-MemoryS7-v0"])
@pytest.mark.filterwarnings("ignore")  # theirs
def test_other_peoples_worlds(name):
    pytest.importorskip(name.split("-")[0].lower(), reason="an optional extra", exc_type=ImportError)
    worlds = make_worlds(name, 2, seed=3)
    assert np.array_equal(steps(worlds, 30), steps(make_worlds(name, 2, seed=3), 30))
    if name.startswith("MiniGrid"):
        assert worlds.single_observation_space.shape == (3, 7, 7)


@pytest.mark.parametrize(("name", "package"), [("popgym-X-v0", "popgym"), ("MiniGrid-X-v0", "minigrid")])
def test_a_missing_extra_is_named(name, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{name}: expected the package {package}, .*pip install .*\[{package}\]'"):
        make_worlds(name, 1, 0)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("VisualMach", "VisualMatch"), ("t_maze_passive", "TMazePassive"), ("CartPole", "CartPole-v1")],
)
def test_an_unknown_name_gets_the_nearest(wrong, right):
    with pytest.raises(
        ValueError, match=f"expected an environment .*TMazePassive.*, got '{wrong}'; did you mean '{right}'"
    ):
        make_worlds(wrong, 1, 0)


def in_a_new_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_gymnasium_knows_them_by_import():
    """With the agent imported, or named in the id."""
    make = "import gymnasium; print(gymnasium.make_vec('{}', 3).num_envs)"
    assert in_a_new_process("import hqlt.agent; " + make.format("hqlt/VisualMatch-v0")) == "3"
    assert in_a_new_process(make.format("hqlt.agent:hqlt/TMazeActive-v0")) == "3"


def test_without_gymnasium_the_package_says_what_is_missing():
    code = """
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "gymnasium" else find(name, *rest)
try:
    import hqlt.agent.worlds
except ImportError as error:
    print(error)
"""
    said = in_a_new_process(code)
    assert said == f"hqlt.agent: expected the package gymnasium, found none; {how_to_install('rl')}"


def test_asynchronous_copies_of_one():
    """gymnasium's own ways to step single copies take ours."""
    worlds = gymnasium.make_vec("hqlt/KeyToDoor-v0", 2, vectorization_mode="async")
    together = make_worlds("KeyToDoor", 2, 0)
    assert np.array_equal(worlds.reset(seed=4)[0], together.reset(seed=4)[0])
    worlds.close()
