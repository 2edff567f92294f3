"""Key to door: taking a key pays off only much later."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hqlt.agent.worlds.grid import OPEN_DOOR, WALL, ThreePhases, cells, place, places
from hqlt.agent.worlds.streams import Indices
from hqlt.agent.worlds.world import Rewards
from hqlt.registry import register

ROOMS = (
    "  #######  ",
    "  #kkkkk#  ",
    "  #kkkkk#  ",
    "  ##...##  ",
    "  #+++++#  ",
    "  #+++++#  ",
    "  #######  ",
)
CELL = (
    "           ",
    "   ##d##   ",
    "   #...#   ",
    "   #.+.#   ",
    "   #...#   ",
    "   #####   ",
    "           ",
)
KEY, LIT = ord("k"), ord("i")
EMPTY_ROOMS, KEY_PLACES, STARTS = cells(ROOMS, k=".", **{"+": "."}), places(ROOMS, "k"), places(ROOMS, "+")
LOCKED, DOOR, INSIDE = cells(CELL, **{"+": ".", " ": "."}), place(1, 5), place(3, 5)
LAMP = place(0, 5)
"""A cell in the upper wall of the first room."""


@register("world", "KeyToDoor")
class KeyToDoor(ThreePhases):
    """The agent can take a key, then eats apples, then passes a door if it has the key.

        explore, 15 steps     distractor, 60        reward, 10
        #######               ###########
        #..k..#               #a.a.a...a#           ##d##
        #.....#               #...a.....#           #...#
        ##...##               #a.......a#           #.+.#
        #...+.#               #.....a.a.#           #...#
        #.....#               #..a.+....#           #####
        #######               ###########

    Key and agent start at random places. Taking the key lights a lamp in the upper wall for one step. Without the key
    the door is a wall; with it, entering the doorway gives `final_reward`, once. The door hides an agent that stands in
    it, and leads out of the room. The key itself gives no reward, so its value must be learned across the apples.
    Success: the door was opened.

    Args:
        num_envs: number of parallel environments.
        explore, distractor, reward: steps of the three phases.
        apples, apple_reward, respawn: see `ThreePhases`; apple_reward=(1, 10) as in Mesnard et al.
        final_reward: reward at the door.
        render_mode: "rgb_array" for frames.

    Source:
        Hung et al. 2019, "Optimizing agent behavior over long time scales by transporting value"; Mesnard et al.
        2021, "Counterfactual Credit Assignment in Model-Free Reinforcement Learning"; times, rewards and the third
        board as in Ni et al. 2023, "When Do Transformers Shine in RL?" (from Raposo et al. 2021, "Synthetic Returns"),
        whose code this reproduces cell by cell.
    """

    def __init__(
        self,
        num_envs: int = 1,
        *,
        explore: int = 15,
        distractor: int = 60,
        reward: int = 10,
        apples: int = 10,
        apple_reward: float | tuple[float, float] = 1.0,
        final_reward: float = 5.0,
        respawn: int | None = 20,
        render_mode: str | None = None,
    ) -> None:
        super().__init__(num_envs, explore, distractor, reward, apples, apple_reward, respawn, render_mode)
        self.final_reward = final_reward
        self._has_key = np.zeros(num_envs, np.bool_)

    def _begin_explore(self, env_ids: Indices) -> None:
        self._board[env_ids] = EMPTY_ROOMS
        self._board[env_ids, KEY_PLACES[self._streams.below(env_ids, len(KEY_PLACES))]] = KEY
        self._position[env_ids] = STARTS[self._streams.below(env_ids, len(STARTS))]
        self._has_key[env_ids] = False

    def _begin_reward(self, env_ids: Indices) -> None:
        self._board[env_ids] = LOCKED
        self._board[env_ids[self._has_key[env_ids]], DOOR] = OPEN_DOOR
        self._position[env_ids] = INSIDE

    def _touch(self, touched: NDArray[np.uint8]) -> Rewards:
        takes, opens = touched == KEY, (touched == OPEN_DOOR) & ~self._success
        self._has_key |= takes
        self._success |= opens
        self._clear(takes)
        lamps = self._board[:, LAMP]
        lamps[lamps == LIT] = WALL
        lamps[takes] = LIT
        return np.where(opens, self.final_reward, 0.0)
