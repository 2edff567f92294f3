"""Passive visual match: remember a color while eating apples."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hqlt.agent.worlds.grid import FLOOR, ThreePhases, cells, place, places
from hqlt.agent.worlds.streams import Indices
from hqlt.agent.worlds.world import Rewards
from hqlt.registry import register

BOX = (
    "           ",
    "    ***    ",
    "    *+*    ",
    "    ***    ",
    "           ",
    "           ",
    "           ",
)
DOORS = (
    "###########",
    "#.0..1..2.#",
    "#.........#",
    "#.........#",
    "####...####",
    "   #.+.#   ",
    "   #####   ",
)
COLOURS, CUES = np.frombuffer(b"rgb", np.uint8), np.frombuffer(b"RGB", np.uint8)
BOXED, AROUND, MIDDLE = cells(BOX, **{"*": "#", "+": "."}), places(BOX, "*"), place(2, 5)
HALL, ENTRANCE = cells(DOORS, **dict.fromkeys("012+", ".")), place(5, 5)
SQUARES = np.concatenate([places(DOORS, symbol) for symbol in "012"])


@register("world", "VisualMatch")
class VisualMatch(ThreePhases):
    """The agent sees a color, then eats apples, then must touch the square of that color among three.

        explore, 15 steps     distractor, 750       reward, 15
                              ###########           ###########
            ###               #a.a.a...a#           #.r..g..b.#
            #+G               #...a.....#           #.........#
            ###               #a.......a#           #.........#
                              #.....a.a.#           ####...####
        enclosed; one of      #..a.+....#              #.+.#
        the 8 cells shows     ###########              #####
        the color

    The agent can walk over the squares. The first one touched decides: `final_reward` if it has the right color,
    otherwise `wrong_reward`; then all three disappear. Success: the right one was touched first. The best return is
    final_reward plus the apples that can be eaten.

    Args:
        num_envs: number of parallel environments.
        explore, distractor, reward: steps of the three phases.
        apples, apple_reward, respawn: see `ThreePhases`.
        final_reward, wrong_reward: reward of the right square, and of a wrong one.
        colors: the squares from left to right, "rgb" or another order of these letters, or "shuffled": a random order
            in each episode. (The code behind the paper draws one unseeded order per run.)
        render_mode: "rgb_array" for frames.

    Source:
        The paper's figure of reinforcement learning, whose numbers are the defaults; Ni et al. 2023, "When Do
        Transformers Shine in RL?", section 5; Hung et al. 2019, "Optimizing agent behavior over long time scales by
        transporting value".
    """

    def __init__(
        self,
        num_envs: int = 1,
        *,
        explore: int = 15,
        distractor: int = 750,
        reward: int = 15,
        apples: int = 10,
        apple_reward: float | tuple[float, float] = 1.0,
        final_reward: float = 100.0,
        wrong_reward: float = 0.0,
        respawn: int | None = 20,
        colours: str = "rgb",
        render_mode: str | None = None,
    ) -> None:
        if colours != "shuffled" and sorted(colours) != sorted("rgb"):
            raise ValueError(f"colours: expected 'shuffled' or r, g and b in some order, got {colours!r}")
        super().__init__(num_envs, explore, distractor, reward, apples, apple_reward, respawn, render_mode)
        self.colours, self.final_reward, self.wrong_reward = colours, final_reward, wrong_reward
        self._target = np.zeros(num_envs, np.uint8)

    def _begin_explore(self, env_ids: Indices) -> None:
        target = self._streams.below(env_ids, len(COLOURS))
        shown_at = AROUND[self._streams.below(env_ids, len(AROUND))]
        self._board[env_ids] = BOXED
        self._board[env_ids, shown_at] = CUES[target]
        self._position[env_ids] = MIDDLE
        self._target[env_ids] = COLOURS[target]

    def _begin_reward(self, env_ids: Indices) -> None:
        self._board[env_ids] = HALL
        if self.colours == "shuffled":
            order = COLOURS[self._streams.order(env_ids, len(COLOURS))]
        else:
            order = np.frombuffer(self.colours.encode(), np.uint8)
        self._board[env_ids[:, None], SQUARES] = order
        self._position[env_ids] = ENTRANCE

    def _touch(self, touched: NDArray[np.uint8]) -> Rewards:
        decided = np.isin(touched, COLOURS)
        right = touched == self._target
        self._success |= right
        self._board[np.flatnonzero(decided)[:, None], SQUARES] = FLOOR
        return np.where(right, self.final_reward, self.wrong_reward * decided)
