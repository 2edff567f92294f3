"""make_worlds: built-in environments by name, others by id, and errors for unknown ones."""

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
def test_environments_by_name(name):
    envs = make_worlds(name, 3, seed=5)
    assert type(envs) is find("world", name) and envs.num_envs == 3
    again = make_worlds(f"hqlt/{name}-v0", 3, seed=5)
    assert np.array_equal(envs.reset()[0], again.reset()[0])
    assert np.array_equal(envs.action_space.sample(), again.action_space.sample())


def test_options_reach_the_environment():
    assert make_worlds("TMazePassive", 1, 0).oracle == 0
    assert make_worlds("TMazeActive", 1, 0).oracle == 1
    envs = make_worlds("TMazeActive", 2, 0, corridor=7, oracle=3)
    assert isinstance(envs, TMaze) and (envs.corridor, envs.oracle) == (7, 3)
    envs = make_worlds("VisualMatch", 2, 0, distractor=40)
    assert isinstance(envs, VisualMatch) and envs.episode_length == 70


def steps(envs: VectorEnv, count: int) -> np.ndarray:
    seen = [envs.reset()[0], *(envs.step(envs.action_space.sample())[0] for _ in range(count))]
    assert all(observation in envs.observation_space for observation in seen)
    return np.stack(seen)


@pytest.mark.parametrize("name", ["CartPole-v1", "gymnasium.envs:CartPole-v1"])
def test_gymnasium_ids(name):
    envs = make_worlds(name, 2, seed=3)
    assert isinstance(envs, SyncVectorEnv)
    assert np.array_equal(steps(envs, 30), steps(make_worlds(name, 2, seed=3), 30))


@pytest.mark.parametrize("name", ["popgym-RepeatPreviousEasy-v0", "MiniGrid-MemoryS7-v0"])
@pytest.mark.filterwarnings("ignore")  # of these packages
def test_environments_of_other_packages(name):
    pytest.importorskip(name.split("-")[0].lower(), reason="an optional extra", exc_type=ImportError)
    envs = make_worlds(name, 2, seed=3)
    assert np.array_equal(steps(envs, 30), steps(make_worlds(name, 2, seed=3), 30))
    if name.startswith("MiniGrid"):
        assert envs.single_observation_space.shape == (3, 7, 7)


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


def test_importing_the_package_registers_them():
    """Imported, or named in the id."""
    make = "import gymnasium; print(gymnasium.make_vec('{}', 3).num_envs)"
    assert in_a_new_process("import hqlt.agent; " + make.format("hqlt/VisualMatch-v0")) == "3"
    assert in_a_new_process(make.format("hqlt.agent:hqlt/TMazeActive-v0")) == "3"


def test_a_missing_gymnasium_is_reported():
    code = """
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "gymnasium" else find(name, *rest)
try:
    import hqlt.agent.worlds
except ImportError as error:
    print(error)
"""
    printed = in_a_new_process(code)
    assert printed == f"hqlt.agent: expected the package gymnasium, found none; {how_to_install('rl')}"


def test_asynchronous_environments():
    """gymnasium's own vectorization works with single environments."""
    envs = gymnasium.make_vec("hqlt/KeyToDoor-v0", 2, vectorization_mode="async")
    together = make_worlds("KeyToDoor", 2, 0)
    assert np.array_equal(envs.reset(seed=4)[0], together.reset(seed=4)[0])
    envs.close()
