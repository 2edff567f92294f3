"""An episode to look at: frames, what was earned, and which memory spoke."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from hqlt.agent.collect import Player
from hqlt.agent.episode import Batch, Episode
from hqlt.report.plots import save
from hqlt.report.shares import Shares, shares_during
from hqlt.train.agent.trainer import AgentTrainer

Frame = NDArray[np.uint8]
"""[height, width, 3]"""

MOMENTS = 9
"""Frames of a strip."""
FILMED = 240
"""Frames of a film, at most."""
FRAME_MS = 120
FW, KV, EARNED = "#c0392b", "#7a7a7a", "#2a9d8f"


class Film(NamedTuple):
    """t steps."""

    frames: list[Frame]
    """t + 1 of them, the first before any action; none where the environment cannot be seen."""
    rewards: NDArray[np.float32]
    """[t]."""
    shares: Shares | None
    """[layers, 1, t]; None for models without two memories in a layer."""
    success: float
    """0 or 1, NaN where the environment says nothing."""


def film(trainer: AgentTrainer, seed: int) -> Film:
    """Play one greedy episode."""
    agent = trainer.agent
    envs, visible = world_to_film(trainer, seed)
    player = Player(envs, agent, seed)
    seen, actions, rewards, frames = [], [], [], []
    ended, success, terminated = False, float("nan"), False
    while not ended:
        if visible:
            frames.append(frame_of(envs))
        seen.append(player.inputs.observation.numpy()[0])
        action, step = player.step(agent, greedy=True)
        actions.append(int(action[0]))
        rewards.append(float(step.reward[0]))
        ended, success, terminated = bool(step.ended[0]), float(step.success[0]), bool(step.terminated[0])
    if visible:
        frames.append(frame_of(envs))
    episode = Episode(
        np.stack([*seen, step.successor[0]]), np.array(actions), np.array(rewards, np.float32), terminated, success
    )
    return Film(frames, episode.rewards, shares_of(trainer, episode), success)


def world_to_film(trainer: AgentTrainer, seed: int) -> tuple[VectorEnv, bool]:
    """One copy, and whether it can be seen: environments have many ways to say that they cannot."""
    with contextlib.suppress(Exception):
        envs = trainer.worlds(1, seed, render_mode="rgb_array")
        frame_of(envs)
        return envs, True
    return trainer.worlds(1, seed), False


def frame_of(envs: VectorEnv) -> Frame:
    frames: Any = envs.render()
    return np.asarray(frames[0], dtype=np.uint8)


def shares_of(trainer: AgentTrainer, episode: Episode) -> Shares | None:
    """What each memory contributed when the episode's actions were chosen."""
    inputs = Batch.of([episode]).to(trainer.agent.device).inputs()
    core = trainer.agent.core
    with torch.no_grad(), contextlib.suppress(ValueError):
        shares = shares_during(core, lambda: core.sequence(inputs, core.init_state(1)))
        return Shares(shares.gate[..., :-1].cpu(), shares.fw[..., :-1].cpu())
    return None


def leave_film(film: Film, folder: Path) -> str:
    """Write episode.png, and episode.gif where there are frames → the PNG as a data URL."""
    if film.frames:
        write_gif(film, folder / "episode.gif")
    return save(figure_of_film(film), folder / "episode.png")


def figure_of_film(film: Film) -> Figure:
    """A strip of moments, each joined to its place in time; below them rewards and the FW-memory's share."""
    steps = len(film.rewards)
    figure = pyplot.figure(figsize=(12, 4.6 if film.frames else 3), layout="constrained")
    grid = figure.add_gridspec(2 if film.frames else 1, 1, height_ratios=[1, 1.5] if film.frames else [1])
    below = figure.add_subplot(grid[-1])
    draw_time(below, film)
    if film.frames:
        at = sorted({round(i * steps / (MOMENTS - 1)) for i in range(MOMENTS)})
        strip = grid[0].subgridspec(1, len(at), wspace=0.05)
        for i, step in enumerate(at):
            axes = figure.add_subplot(strip[i])
            axes.imshow(film.frames[step], interpolation="nearest")
            axes.set_title(f"after {step}" if step else "before the first step", fontsize=9)
            axes.set_axis_off()
            below.axvline(step + 0.5, color="#bbbbbb", linewidth=0.6, zorder=0)
    return figure


def draw_time(axes: Axes, film: Film) -> None:
    """Rewards as bars; shares and gates as lines, of the step at which an action was chosen."""
    steps = np.arange(1, len(film.rewards) + 1)
    axes.set_xlim(0.5, len(steps) + 0.5)
    axes.set_xlabel("step")
    axes.spines[["top"]].set_visible(False)
    if film.shares is not None:
        for layer in film.shares.fw[:, 0]:
            axes.plot(steps, layer, color=FW, linewidth=0.7, alpha=0.5)
        axes.plot(steps, film.shares.fw[:, 0].mean(0), color=FW, linewidth=2, label="FW-memory's share")
        axes.plot(
            steps, film.shares.gate[:, 0].mean(0), color=KV, linewidth=1, linestyle="--", label="mixer's gate to FW"
        )
        axes.set_ylim(0, 1)
        axes.set_ylabel("FW-memory", color=FW)
        axes.legend(frameon=False, loc="upper left", ncols=2)
    earned = axes.twinx() if film.shares is not None else axes
    earned.bar(steps, film.rewards, color=EARNED, alpha=0.5, width=0.8)
    earned.set_ylabel("reward", color=EARNED)
    earned.spines[["top"]].set_visible(False)


def write_gif(film: Film, path: Path) -> None:
    """The frames, and below them the time line with a cursor."""
    steps = len(film.rewards)
    every = -(-len(film.frames) // FILMED)
    shown = [*range(0, steps, every), steps]
    width = film.frames[0].shape[1]
    zoom = max(1, round(420 / width))
    figure = Figure(figsize=(width * zoom / 80, 2.2), dpi=80, layout="constrained")
    axes = figure.add_subplot()
    draw_time(axes, film)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    time = np.asarray(canvas.buffer_rgba())[..., :3]
    pictures = []
    for step in shown:
        line = time.copy()
        x, _ = axes.transData.transform((step + 0.5, 0))
        cursor = int(np.clip(x, 1, line.shape[1] - 2))
        line[:, cursor - 1 : cursor + 1] = (40, 40, 40)
        frame = film.frames[step].repeat(zoom, axis=0).repeat(zoom, axis=1)
        wide = max(frame.shape[1], line.shape[1])
        pictures.append(Image.fromarray(np.concatenate([widened(frame, wide), widened(line, wide)])))
    last = [FRAME_MS] * (len(pictures) - 1) + [10 * FRAME_MS]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=last, loop=0)


def widened(frame: Frame, width: int) -> Frame:
    """White to the right."""
    missing = width - frame.shape[1]
    return np.pad(frame, ((0, 0), (0, missing), (0, 0)), constant_values=255)
