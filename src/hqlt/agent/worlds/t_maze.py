"""T-maze: remember one bit along a corridor."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from gymnasium.spaces import Box
from numpy.typing import NDArray

from hqlt.agent.worlds.streams import Indices
from hqlt.agent.worlds.world import Observations, Rewards, World
from hqlt.ranges import COUNT, INDEX, check_range
from hqlt.registry import register

ACROSS, ALONG = np.array([1, -1, 0, 0]), np.array([0, 0, -1, 1])
"""Change of y and of x by each action."""
WALL, FLOOR, AGENT, GOAL, UP, DOWN = range(6)
COLOURS = np.array(
    [(25, 25, 25), (204, 204, 204), (229, 149, 110), (80, 170, 80), (40, 90, 220), (240, 200, 40)], np.uint8
)
PIXELS = 12
"""Side of a cell in a rendered frame."""


class TMaze(World):
    """A corridor from an oracle to a junction with two arms; the goal is the arm that the oracle names.

                                 ┌ arm, y = 1
        oracle ─ start ─ … ─ junction        oracle = 1: active T-maze
         x = 0    x = o          └ arm, y = −1        oracle = 0: passive T-maze, the start is at the oracle

    Observations are float32 [2]: (0, cue) at the oracle, where cue is ±1 on the first visit and 0 on later ones; (0, 0)
    in the corridor, whose cells look alike; (1, y) at the junction and in the arms.

    With L = corridor steps from start to junction and o = oracle steps from start to oracle, an episode takes
    T = L + 2·o + 1 steps, just enough to visit the oracle, return to the junction and enter an arm. Rewards: at t = T,
    goal_reward · [y = goal]; before, penalty · [x < t − o] for each step behind that pace. Success: y = goal at T.

        returns with penalty −1/L:   optimal 1;   a random arm ½ on average;   waiting at the start −1 (passive)

    Args:
        num_envs: number of parallel environments.
        corridor: L.
        oracle: o; None: 0 for TMazePassive, 1 for TMazeActive.
        goal_reward: reward at the goal.
        penalty: reward of each late step; None: −1/L.
        render_mode: "rgb_array" for frames.

    Source:
        Ni et al. 2023, "When Do Transformers Shine in RL?", section 4 and its code, which orders the four actions
        differently; after Bakker 2001, "Reinforcement Learning with Long Short-Term Memory".
    """

    ORACLE: ClassVar[int] = 0
    """Default of `oracle`."""

    def __init__(
        self,
        num_envs: int = 1,
        *,
        corridor: int = 10,
        oracle: int | None = None,
        goal_reward: float = 1.0,
        penalty: float | None = None,
        render_mode: str | None = None,
    ) -> None:
        oracle = self.ORACLE if oracle is None else oracle
        check_range("corridor", corridor, COUNT)
        check_range("oracle", oracle, INDEX)
        self.corridor, self.oracle, self.junction = corridor, oracle, corridor + oracle
        self.goal_reward, self.penalty = goal_reward, -1 / corridor if penalty is None else penalty
        super().__init__(num_envs, Box(-1, 1, (2,), np.float32), corridor + 2 * oracle + 1, render_mode)
        self._x = np.zeros(num_envs, np.int32)
        self._y = np.zeros(num_envs, np.int8)
        self._goal = np.ones(num_envs, np.int8)
        self._cue_time = np.full(num_envs, -1, np.int32)  # time of the first visit to the oracle

    def _begin(self, env_ids: Indices) -> None:
        self._x[env_ids], self._y[env_ids] = self.oracle, 0
        self._goal[env_ids] = 2 * self._streams.below(env_ids, 2) - 1
        self._cue_time[env_ids] = 0 if self.oracle == 0 else -1

    def _move(self, actions: NDArray[np.intp]) -> Rewards:
        along = np.where(self._y == 0, ALONG[actions], 0)
        across = np.where(self._x == self.junction, ACROSS[actions], 0)
        self._x = np.clip(self._x + along, 0, self.junction).astype(np.int32)
        self._y = np.clip(self._y + across, -1, 1).astype(np.int8)
        self._cue_time = np.where((self._cue_time < 0) & (self._x == 0), self._time, self._cue_time)
        self._success = (self._time == self.episode_length) & (self._y == self._goal)
        behind = (self._x < self._time - self.oracle) & (self._time < self.episode_length)
        return self.goal_reward * self._success + self.penalty * behind

    def _observations(self) -> Observations:
        at_end = self._x == self.junction
        shows_cue = self._cue_time == self._time
        return np.stack([at_end, np.where(at_end, self._y, shows_cue * self._goal)], axis=1, dtype=np.float32)

    def _frames(self) -> NDArray[np.uint8]:
        """The goal is green; the oracle's cell is blue (up) or yellow (down) while it shows the cue."""
        cells = np.full((self.num_envs, 5, self.junction + 3), WALL)
        cells[:, 2, 1:-1] = FLOOR
        cells[:, [1, 3], -2] = FLOOR
        cells[self._all, 2 - self._goal, -2] = GOAL
        cells[self._all, 2 - self._y, self._x + 1] = AGENT
        frames = COLOURS[cells].repeat(PIXELS, axis=1).repeat(PIXELS, axis=2)
        # the agent covers the oracle's cell, so only the edge of that cell shows the cue
        shown = np.flatnonzero(self._cue_time == self._time)
        cue = COLOURS[np.where(self._goal[shown] == 1, UP, DOWN)]
        frames[shown, 2 * PIXELS : 3 * PIXELS, PIXELS : PIXELS + PIXELS // 2] = cue[:, None, None]
        return frames


@register("world", "TMazePassive")
class TMazePassive(TMaze):
    """The agent starts at the oracle."""


@register("world", "TMazeActive")
class TMazeActive(TMaze):
    """The agent must first visit the oracle."""

    ORACLE = 1
