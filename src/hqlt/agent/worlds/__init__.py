"""Partially observable environments, thousands in parallel: T-maze, key to door, visual match; others by their id."""

from __future__ import annotations

from hqlt.agent.worlds.key_to_door import KeyToDoor
from hqlt.agent.worlds.make import make_worlds, register_with_gymnasium
from hqlt.agent.worlds.t_maze import TMaze, TMazeActive, TMazePassive
from hqlt.agent.worlds.visual_match import VisualMatch
from hqlt.agent.worlds.world import ACTIONS, SingleEnv, World

__all__ = [
    "ACTIONS",
    "KeyToDoor",
    "SingleEnv",
    "TMaze",
    "TMazeActive",
    "TMazePassive",
    "VisualMatch",
    "World",
    "make_worlds",
    "register_with_gymnasium",
]
