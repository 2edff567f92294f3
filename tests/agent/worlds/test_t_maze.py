"""Rules of the T-maze: episodes worked out by hand, and random ones."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hqlt.agent  # noqa: F401  registers the environments
from hqlt.agent.worlds import TMaze
from tests.agent.worlds.helpers import D, L, R, U, play

THIRD = 1 / 3


def passive(cue: int, **options):
    """Start an episode with this cue in a T-maze with a corridor of 3."""
    environment = gymnasium.make("hqlt/TMazePassive-v0", corridor=3, **options).unwrapped
    while environment.reset(seed=None)[0][1] != cue:
        pass
    return environment


def active(goal: int):
    environment = gymnasium.make("hqlt/TMazeActive-v0", corridor=3).unwrapped
    environment.reset(seed=0)
    while environment.world._goal[0] != goal:
        environment.reset()
    return environment


@pytest.mark.parametrize(
    ("cue", "moves", "rewards", "success"),
    [
        (+1, "rrru", [0, 0, 0, 1], True),
        (-1, "rrrd", [0, 0, 0, 1], True),
        (+1, "rrrd", [0, 0, 0, 0], False),
        (-1, "rrru", [0, 0, 0, 0], False),
        (+1, "rrrr", [0, 0, 0, 0], False),  # still at the junction
        (+1, "llll", [-THIRD, -THIRD, -THIRD, 0], False),  # the last step is never penalized
        (+1, "urrr", [-THIRD, -THIRD, -THIRD, 0], False),  # a lost step cannot be made up
        (+1, "rlrr", [0, -THIRD, -THIRD, 0], False),
    ],
)
def test_passive_episodes_by_hand(cue, moves, rewards, success):
    got, seen, info = play(passive(cue), moves)
    assert got == pytest.approx(rewards)
    assert info == {"success": success}
    if moves == "rrru":
        assert np.array_equal(seen, [[0, 0], [0, 0], [1, 0], [1, 1]])
    if moves == "llll":
        assert np.array_equal(seen, np.zeros((4, 2)))  # the cue is shown only once


@pytest.mark.parametrize(
    ("goal", "moves", "rewards", "success"),
    [
        (+1, "lrrrru", [0, 0, 0, 0, 0, 1], True),
        (-1, "lrrrrd", [0, 0, 0, 0, 0, 1], True),
        (-1, "lrrrru", [0, 0, 0, 0, 0, 0], False),
        (+1, "rrruuu", [0, 0, 0, 0, 0, 1], True),  # a lucky guess
        (+1, "rrrudu", [0, 0, 0, 0, 0, 1], True),  # back and forth
        (+1, "llrrrr", [0, -THIRD, -THIRD, -THIRD, -THIRD, 0], False),
        (+1, "rrrull", [0, 0, 0, 0, 0, 1], True),  # walls stop the agent in an arm
    ],
)
def test_active_episodes_by_hand(goal, moves, rewards, success):
    got, seen, info = play(active(goal), moves)
    assert got == pytest.approx(rewards)
    assert info == {"success": success}
    if moves.startswith("lrrrr"):
        assert np.array_equal(seen[:5], [[0, goal], [0, 0], [0, 0], [0, 0], [1, 0]])


def test_rewards_and_penalty_are_arguments():
    environment = passive(1, goal_reward=5.0, penalty=-0.25)
    assert play(environment, "urrr")[0] == [-0.25, -0.25, -0.25, 0]
    environment = passive(1, goal_reward=5.0, penalty=0.0)
    assert play(environment, "rrru")[0] == [0, 0, 0, 5]


@given(corridor=st.integers(1, 6), oracle=st.integers(0, 3), seed=st.integers(0, 99))
def test_rules(corridor, oracle, seed):
    """Compared with a plain reference: walls, rewards, and a cue that is visible only at the first visit."""
    n, length = 20, corridor + 2 * oracle + 1
    envs = TMaze(n, corridor=corridor, oracle=oracle)
    seen, _ = envs.reset(seed=seed)
    goal, rng = envs._goal.copy(), np.random.default_rng(seed)
    place = [(oracle, 0)] * n
    cells = {(x, 0) for x in range(corridor + oracle + 1)} | {(corridor + oracle, y) for y in (1, -1)}
    visited = [oracle == 0] * n
    assert (seen[:, 1] == (goal if oracle == 0 else 0)).all() and (seen[:, 0] == 0).all()
    for time in range(1, length + 1):
        actions = rng.choice([U, D, L, R], size=n, p=[0.2, 0.2, 0.2, 0.4])
        seen, rewards, ended, _, info = envs.step(actions)
        for i in range(n):
            x, y = place[i]
            ahead = {U: (x, y + 1), D: (x, y - 1), L: (x - 1, y), R: (x + 1, y)}[int(actions[i])]
            place[i] = x, y = ahead if ahead in cells else (x, y)
            shows_cue = x == 0 and not visited[i]
            visited[i] |= x == 0
            at_end = x == corridor + oracle
            assert tuple(seen[i]) == (at_end, y if at_end else shows_cue * goal[i])
            right = y == goal[i]
            assert rewards[i] == (right if time == length else -(x < time - oracle) / corridor)
            if time == length:
                assert info["success"][i] == right
    assert ended.all()


def test_goals_are_uniform():
    envs = TMaze(4000)
    envs.reset(seed=0)
    first = envs._goal.copy()
    envs.reset()
    for goals in (first, envs._goal, first * envs._goal, first[1:] * first[:-1]):
        assert abs(goals.mean()) < 4 / 4000**0.5
