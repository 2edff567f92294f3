"""Helpers that play environments, and a plain-Python reference of the grid environments' rules."""

from __future__ import annotations

import numpy as np

from hqlt.agent.worlds import ACTIONS, SingleEnv, World
from hqlt.agent.worlds.grid import MARGIN, WIDTH

U, D, L, R = range(4)


def actions_of(text: str) -> list[int]:
    """Convert "uul" to up, up, left."""
    return [[name[0] for name in ACTIONS].index(letter) for letter in text]


def play(environment: SingleEnv, text: str) -> tuple[list[float], list[np.ndarray], dict]:
    """Play these moves from the start of an episode; returns rewards, observations and the last info."""
    rewards, seen, info = [], [], {}
    for action in actions_of(text):
        assert info == {}
        observation, reward, ended, _, info = environment.step(action)
        rewards.append(reward)
        seen.append(observation)
        assert ended == ("success" in info)
    return rewards, seen, info


def board_of(envs: World, i: int = 0) -> list[str]:
    """Return the board as drawn in the docstrings, without the agent."""
    rows = bytes(envs._board[i]).decode().replace("\0", " ")
    rows = [rows[j : j + WIDTH] for j in range(0, len(rows), WIDTH)]
    return [row[MARGIN:-MARGIN] for row in rows[MARGIN:-MARGIN]]


def position_of(envs: World, i: int = 0) -> tuple[int, int]:
    """Return row and column of the agent."""
    row, column = divmod(int(envs._position[i]), WIDTH)
    return row - MARGIN, column - MARGIN


class ReferenceBoard:
    """One phase of a grid environment in plain Python: walls, apples, and the objects that the agent touches."""

    def __init__(self, board: list[str], position: tuple[int, int], respawn: int | None) -> None:
        self.board = {(i, j): symbol for i, row in enumerate(board) for j, symbol in enumerate(row)}
        self.position, self.respawn, self.time = position, respawn, 0
        self.eaten: dict[tuple[int, int], int] = {}

    def step(self, action: int) -> str:
        """Move the agent; returns the symbol that it touched."""
        self.time += 1
        i, j = self.position
        ahead = [(i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)][action]
        if self.board.get(ahead, " ") in ".akDrgb":
            self.position = ahead
        touched = self.board[self.position]
        self.board = {cell: "#" if symbol == "i" else symbol for cell, symbol in self.board.items()}
        if touched == "k":
            self.board[0, 5] = "i"
        if touched in "ak":
            self.board[self.position] = "."
        if touched == "a":
            self.eaten[self.position] = self.time
        if touched in "rgb":
            self.board = {cell: "." if symbol in "rgb" else symbol for cell, symbol in self.board.items()}
        for cell, time in list(self.eaten.items()):
            if self.respawn is not None and self.time > time + self.respawn:
                self.board[cell] = "a"
                del self.eaten[cell]
        return touched

    def view(self) -> list[str]:
        """Return the 5 × 5 cells around the agent."""
        i, j = self.position
        window = [[self.board.get((y, x), " ") for x in range(j - 2, j + 3)] for y in range(i - 2, i + 3)]
        window[2][2] = "D" if window[2][2] == "D" else "+"
        return ["".join(row) for row in window]
