"""Environments with three phases on boards of 7 × 11 cells: information, distraction by apples, decision."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from gymnasium.spaces import Box
from numpy.typing import NDArray

from hqlt.agent.worlds.streams import Indices
from hqlt.agent.worlds.world import Observations, Rewards, World
from hqlt.ranges import COUNT, INDEX, Range, check_range

Places: TypeAlias = NDArray[np.int16]
"""Cells of a board with its margin, as row · WIDTH + column."""

VIEW_SIZE = 5
MARGIN = VIEW_SIZE // 2
HEIGHT, WIDTH = 7 + 2 * MARGIN, 11 + 2 * MARGIN
PIXELS = 16
"""Side of a cell in a rendered frame."""

COLOURS = {
    " ": (204, 204, 204),  # outside
    ".": (204, 204, 204),
    "#": (25, 25, 25),
    "+": (229, 149, 110),  # the agent
    "a": (140, 178, 0),
    "k": (160, 82, 45),
    "d": (135, 206, 235),
    "D": (135, 206, 235),  # an open door
    "r": (255, 0, 0),
    "g": (0, 255, 0),
    "b": (0, 0, 255),
    "R": (255, 0, 0),  # the same colors inside a wall
    "G": (0, 255, 0),
    "B": (0, 0, 255),
    "i": (255, 255, 255),  # a lamp inside a wall
}
PALETTE = np.zeros((3, 128), np.uint8)
PALETTE[:, [ord(symbol) for symbol in COLOURS]] = np.array(list(COLOURS.values())).T
PASSABLE = np.isin(np.arange(128), [ord(symbol) for symbol in ".akDrgb"])
FLOOR, WALL, AGENT, APPLE, OPEN_DOOR = map(ord, ".#+aD")
MOVES = np.array([-WIDTH, WIDTH, -1, 1], np.int16)

ORCHARD = (
    "###########",
    "#a.a.a.a.a#",
    "#.a.a.a.a.#",
    "#a.a.a.a.a#",
    "#.a.a.a.a.#",
    "#a.a...a.a#",
    "###########",
)


def place(row: int, column: int) -> int:
    """Return the index of a cell of the board."""
    return (row + MARGIN) * WIDTH + column + MARGIN


def places(board: Sequence[str], symbol: str) -> Places:
    """Return the cells of a board that hold a symbol."""
    return np.array([place(i, j) for i, row in enumerate(board) for j, s in enumerate(row) if s == symbol], np.int16)


def cells(board: Sequence[str], **becomes: str) -> NDArray[np.uint8]:
    """Return the board with its margin, [HEIGHT · WIDTH], with some symbols replaced."""
    text = np.full((HEIGHT, WIDTH), ord(" "), np.uint8)
    letters = [[ord(becomes.get(symbol, symbol)) for symbol in row] for row in board]
    text[MARGIN:-MARGIN, MARGIN:-MARGIN] = letters
    return text.reshape(-1)


CROP = np.array([place(i, j) - place(MARGIN, MARGIN) for i in range(VIEW_SIZE) for j in range(VIEW_SIZE)], np.int16)
TREES, CLEARED, CLEARING = places(ORCHARD, "a"), cells(ORCHARD, a="."), place(5, 5)


class ThreePhases(World):
    """Base class: an agent moves up, down, left and right among walls, and sees the 5 × 5 cells around it.

    Observations are uint8 [3, 5, 5] (red, green, blue) with the agent, or the open door in which it stands, in the
    middle. Keys and apples disappear when the agent touches them. The first phase takes `explore` steps, the second one
    `distractor` steps among apples, the third one `reward` steps. The step that ends a phase is still rewarded; its
    observation already shows the next phase.

    Args:
        num_envs: number of parallel environments.
        explore: steps of the first phase.
        distractor: steps of the second phase.
        reward: steps of the third phase.
        apples: number of apples, at random ones of 22 places in each episode.
        apple_reward: reward of an apple; of a pair, one is drawn in each episode.
        respawn: an apple eaten at step t is missing from observations t … t + respawn; None: it never returns.
        render_mode: "rgb_array" for frames.

    Source:
        Hung et al. 2019, "Optimizing agent behavior over long time scales by transporting value", and its code
        (deepmind-research/tvt/pycolab), from which boards, colors and times are taken.
    """

    def __init__(
        self,
        num_envs: int,
        explore: int,
        distractor: int,
        reward: int,
        apples: int,
        apple_reward: float | tuple[float, float],
        respawn: int | None,
        render_mode: str | None,
    ) -> None:
        for name, value, allowed in (
            ("explore", explore, COUNT),
            ("distractor", distractor, INDEX),
            ("reward", reward, COUNT),
            ("apples", apples, Range(0, len(TREES), whole=True)),
            ("respawn", 0 if respawn is None else respawn, INDEX),
        ):
            check_range(name, value, allowed)
        super().__init__(
            num_envs, Box(0, 255, (3, VIEW_SIZE, VIEW_SIZE), np.uint8), explore + distractor + reward, render_mode
        )
        self.explore, self.distractor, self.reward, self.apples, self.respawn = (
            explore, distractor, reward, apples, respawn,
        )  # fmt: skip
        self._worth = np.array(apple_reward if isinstance(apple_reward, tuple) else (apple_reward,) * 2, np.float64)
        self._apple_reward = np.zeros(num_envs)
        self._board = np.full((num_envs, HEIGHT * WIDTH), ord(" "), np.uint8)
        self._position = np.full(num_envs, CLEARING, np.int16)
        # the cell of an eaten apple (0: none), by the time modulo the time after which it returns
        self._eaten = np.zeros((num_envs, (distractor if respawn is None else respawn) + 1), np.uint8)

    @abstractmethod
    def _begin_explore(self, env_ids: Indices) -> None:
        """Set up the first phase: board and agent."""

    @abstractmethod
    def _begin_reward(self, env_ids: Indices) -> None:
        """Set up the third phase: board and agent."""

    @abstractmethod
    def _touch(self, touched: NDArray[np.uint8]) -> Rewards:
        """Apply the effects of the symbols under the agents, except apples; returns rewards [n]."""

    def _begin(self, env_ids: Indices) -> None:
        self._eaten[env_ids] = 0
        self._begin_explore(env_ids)

    def _begin_distractor(self, env_ids: Indices) -> None:
        trees = TREES[self._streams.order(env_ids, len(TREES))[:, : self.apples]]
        self._board[env_ids] = CLEARED
        self._board[env_ids[:, None], trees] = APPLE
        self._position[env_ids] = CLEARING
        self._apple_reward[env_ids] = self._worth[self._streams.below(env_ids, 2)]

    def _move(self, actions: NDArray[np.intp]) -> Rewards:
        ahead = self._position + MOVES[actions]
        free = PASSABLE[self._board[self._all, ahead]]
        self._position = np.where(free, ahead, self._position)
        touched = self._board[self._all, self._position]
        rewards = self._eat(touched == APPLE) + self._touch(touched)
        arrived = np.flatnonzero(self._time == self.explore)
        if arrived.size:
            self._begin_distractor(arrived)
        arrived = np.flatnonzero(self._time == self.explore + self.distractor)
        if arrived.size:
            self._begin_reward(arrived)
            self._eaten[arrived] = 0
        return rewards

    def _eat(self, eats: NDArray[np.bool_]) -> Rewards:
        slot = self._time % self._eaten.shape[1]
        back = self._eaten[self._all, slot]
        env_ids = np.flatnonzero(back)
        self._board[env_ids, back[env_ids]] = APPLE
        self._eaten[self._all, slot] = np.where(eats, self._position, 0)
        self._clear(eats)
        return np.where(eats, self._apple_reward, 0.0)

    def _clear(self, mask: NDArray[np.bool_]) -> None:
        """Empty the cells under the agents of these environments."""
        self._board[mask, self._position[mask]] = FLOOR

    def _observations(self) -> Observations:
        seen = self._board[self._all[:, None], self._position[:, None] + CROP]
        middle = seen[:, VIEW_SIZE * VIEW_SIZE // 2]
        middle[middle != OPEN_DOOR] = AGENT
        images = np.empty((self.num_envs, 3, VIEW_SIZE * VIEW_SIZE), np.uint8)
        for colour in range(3):
            images[:, colour] = PALETTE[colour][seen]
        return images.reshape(self.num_envs, 3, VIEW_SIZE, VIEW_SIZE)

    def _frames(self) -> NDArray[np.uint8]:
        """The board without its margin; cells that the agent does not see are darker."""
        board = self._board.copy()
        board[self._all, self._position] = AGENT
        frames = PALETTE.T[board]
        dark = np.ones(board.shape, np.bool_)
        dark[self._all[:, None], self._position[:, None] + CROP] = False
        frames[dark] //= 2
        frames = frames.reshape(-1, HEIGHT, WIDTH, 3)[:, MARGIN:-MARGIN, MARGIN:-MARGIN]
        return frames.repeat(PIXELS, axis=1).repeat(PIXELS, axis=2)
