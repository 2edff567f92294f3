"""Draw an episode as a row of frames: `python docs/strip.py TMazeActive lrrrrrrrru maze.png --show=[0,1,5,9,10]`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hqlt.agent.worlds.make import make_worlds
from hqlt.agent.worlds.world import ACTIONS

Frame = NDArray[np.uint8]
"""[height, width, 3]"""


def strip(frames: Sequence[Frame], gap: int = 6) -> Frame:
    """Join frames of one size from left to right, with white gaps: [height, n · width + (n − 1) · gap, 3]."""
    white = np.full((frames[0].shape[0], gap, 3), 255, np.uint8)
    return np.concatenate([part for frame in frames for part in (white, frame)][1:], axis=1)


def film(name: str, moves: str, seed: int = 0, **options: Any) -> list[Frame]:
    """Return the first frame of an episode, and the one after each move, a letter of u, d, l, r."""
    letters = "".join(action[0] for action in ACTIONS)
    if not set(moves) <= set(letters):
        raise ValueError(f"moves: expected letters of {letters}, got {moves!r}")
    envs = make_worlds(name, 1, seed, render_mode="rgb_array", **options)
    envs.reset(seed=seed)
    frames = [envs.render()]
    for move in moves:
        envs.step(np.array([letters.index(move)]))
        frames.append(envs.render())
    return [np.asarray(frame[0]) for frame in frames if frame]


def draw(
    env: str,
    moves: str,
    out: Path,
    seed: int = 0,
    show: list[int] | None = None,
    options: dict[str, Any] | None = None,
) -> None:
    """Play an episode and save its frames as one picture. Needs matplotlib: pip install 'hqlt[report]'.

    Args:
        env: TMazePassive, TMazeActive, KeyToDoor or VisualMatch.
        moves: the agent's actions, letters of u, d, l, r.
        out: file of the picture, .png.
        seed: seed of the episode.
        show: steps whose frames are shown; 0 is the start. All by default.
        options: arguments of the environment, such as '{"distractor": 12}'.
    """
    from matplotlib.image import imsave

    frames = film(env, moves, seed, **(options or {}))
    imsave(out, strip([frames[step] for step in show] if show else frames))


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(draw)
