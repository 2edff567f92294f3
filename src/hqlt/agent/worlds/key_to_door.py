"""Key to door: a key that is worth nothing until much later."""

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
"""In the first place's upper wall."""


@register("world", "KeyToDoor")
class KeyToDoor(ThreePhases):
    """A key can be taken, apples are eaten, and a door opens for those who took the key.

        explore, 15 steps     distractor, 60        reward, 10
        #######               ###########
        #..k..#               #a.a.a...a#           ##d##
        #.....#               #...a.....#           #...#
        ##...##               #a.......a#           #.+.#
        #...+.#               #.....a.a.#           #...#
        #.....#               #..a.+....#           #####
        #######               ###########

    Key and agent begin at places drawn each episode. When the key is taken, a lamp in the upper wall is lit for one
    step. Without the key, the door is a wall; with it, to enter the doorway gives `final_reward`, once. The door stays
    where it is, is seen in front of an agent that stands in it, and leads out onto the ground around the room. The key
    itself gives nothing, so that what it is worth must be learnt over the apples. Success: the door was opened.

    num_envs: copies. explore, distractor, reward: steps of the phases. apples, apple_reward, respawn: see ThreePhases;
    apple_reward = (1, 10) is what makes Mesnard et al.'s return vary.

    Source: Hung et al. 2019, "Optimizing agent behavior over long time scales by transporting value"; Mesnard et al.
    2021, "Counterfactual Credit Assignment in Model-Free Reinforcement Learning"; times, rewards and the third board as
    in Ni et al. 2023, "When Do Transformers Shine in RL?" (from Raposo et al. 2021, "Synthetic Returns"), whose code
    shows the same cell by cell.
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
