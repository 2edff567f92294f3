"""Pictures and films of an episode: frames, rewards, and the contribution of each memory."""

from __future__ import annotations

import base64
import contextlib
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium.vector import VectorEnv, VectorWrapper
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from hqlt.agent.collect import play
from hqlt.agent.episode import Batch, Episode
from hqlt.report.kept import KeptPairs, kept_during
from hqlt.report.kept_page import draw_kept
from hqlt.report.palette import FW, GREEN, GREY
from hqlt.report.plots import save
from hqlt.report.shares import Shares, shares_during
from hqlt.train.agent.trainer import AgentTrainer

Frame = NDArray[np.uint8]
"""[height, width, 3]"""

MOMENTS = 9
"""Number of frames in a picture."""
FILMED = 240
"""Maximum number of frames in a film."""
FRAME_MS = 120
"""Duration of a frame in a film."""
PIXELS = 640
"""Minimum width of a film."""
WIDTH, HEIGHT, CAPTION = 11.0, 4.2, 0.3
"""Size of the frames in a picture, in inches: total width, maximum total height, height of a frame's title."""
REWARD = GREEN


class Film(NamedTuple):
    """A filmed episode of t steps."""

    frames: dict[int, Frame]
    """Frames by step: 0, t, and some or all in between; empty if the environment has no frames."""
    rewards: NDArray[np.float32]
    """[t] reward of each step."""
    shares: Shares | None
    """[layers, 1, t] shares of the memories; None for models without layers with two memories."""
    success: float
    """0 or 1; NaN if the environment does not report success."""
    kept: KeptPairs | None = None
    """[heads, 1, t]; None for models that keep no KV entries beyond their windows."""


class Camera(VectorWrapper):
    """Records frames of an episode: one per step, or every 2nd, 4th, … step of a long one, and always the last."""

    def __init__(self, envs: VectorEnv) -> None:
        super().__init__(envs)
        self.frames: dict[int, Frame] = {}
        self.steps, self.every = 0, 1

    def reset(self, **options: Any) -> Any:
        result = super().reset(**options)
        self.frames, self.steps, self.every = {0: frame_of(self.env)}, 0, 1
        return result

    def step(self, actions: Any) -> Any:
        result = super().step(actions)
        self.steps += 1
        if len(self.frames) > 2 * FILMED:
            self.every *= 2
            self.frames = {step: frame for step, frame in self.frames.items() if step % self.every == 0}
        if self.steps % self.every == 0 or result[2][0] or result[3][0]:
            self.frames[self.steps] = frame_of(self.env)
        return result


def film(trainer: AgentTrainer, seed: int) -> Film:
    """Play and record one greedy episode.

    Args:
        trainer: with the agent and its settings.
        seed: of the episode.

    Returns:
        Frames, rewards, and the contribution of each memory.

    Raises:
        Stopped, ValueError: as `hqlt.agent.play`.
    """
    with contextlib.closing(make_env_to_film(trainer, seed)) as envs:
        (episode,) = play(trainer.agent, envs, 1, seed=seed, greedy=True, stopped=trainer.signals)
        frames = envs.frames if isinstance(envs, Camera) else {}
    shares, kept = (record_memory(trainer, episode, during) for during in (shares_during, kept_during))
    return Film(
        frames,
        episode.rewards,
        shares and Shares(shares.gate[..., :-1].cpu(), shares.fw[..., :-1].cpu()),
        episode.success,
        kept and kept.before(len(episode.rewards)),
    )


def make_env_to_film(trainer: AgentTrainer, seed: int) -> VectorEnv:
    """Build one environment, wrapped in a Camera if it can render frames."""
    with contextlib.suppress(Exception):
        envs = Camera(trainer.make_envs(1, seed, render_mode="rgb_array"))
        frame_of(envs)
        return envs
    return trainer.make_envs(1, seed)


def frame_of(envs: VectorEnv) -> Frame:
    """Return the current frame of the first environment."""
    frames: Any = envs.render()
    return np.asarray(frames[0], dtype=np.uint8)


def record_memory(trainer: AgentTrainer, episode: Episode, during: Any) -> Any:
    """Run an episode through the core under `shares_during` or `kept_during`; None if the model has none of these."""
    inputs = Batch.from_episodes([episode]).to(trainer.agent.device).inputs()
    core = trainer.agent.core
    with torch.no_grad(), contextlib.suppress(ValueError):
        return during(core, lambda: core.sequence(inputs, core.init_state(1)))
    return None


def write_film(film: Film, folder: Path) -> list[dict[str, str]]:
    """Write episode.png and, if there are frames, episode.gif.

    Returns:
        The same for a page: `plot` (HTML) and `film` (data URL).
    """
    pictures = [{"plot": save(figure_of_film(film), folder / "episode.png")}]
    if film.frames:
        write_gif(film, folder / "episode.gif")
        gif = base64.b64encode((folder / "episode.gif").read_bytes()).decode()
        pictures.append({"film": f"data:image/gif;base64,{gif}"})
    return pictures


def figure_of_film(film: Film) -> Figure:
    """Draw selected frames in rows; below them rewards, the FW-memory's share and how long entries were kept."""
    shown = moments(film)
    columns, height = strip_layout(film.frames[shown[0]].shape[:2], len(shown)) if shown else (1, 0.0)
    strip = 0.0 if film.kept is None else min(max(0.25 * len(film.kept.heads), 0.8), 3) + 0.5
    figure = pyplot.figure(figsize=(WIDTH, 2.8 + strip + height), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=[height, 2.8 + strip]) if shown else [figure]
    rows = math.ceil(len(shown) / columns)
    # first, so that they come first on a page too
    panels = parts[0].subplots(rows, columns, squeeze=False).ravel() if shown else ()
    if film.kept is None:
        below = parts[-1].subplots()
    else:
        below, kept = parts[-1].subplots(2, 1, sharex=True, height_ratios=[2.8, strip])
        draw_kept(kept, film.kept, "step")
        kept.set_gid("time")
    draw_time(below, film, parts[-1])
    below.set_gid("time")
    if film.kept is not None:
        below.set_xlabel("")
    for axes in panels[len(shown) :]:
        axes.remove()
    for axes, step in zip(panels, shown, strict=False):
        axes.set_axis_off()
        axes.imshow(film.frames[step], interpolation="nearest")
        axes.set_title(f"step {step}" if step else "start", fontsize=9)
        below.axvline(step + 0.5, color=GREY, linewidth=0.5, zorder=0)
    return figure


def moments(film: Film) -> list[int]:
    """Return the steps whose frames are shown, at equal intervals; [] if there are no frames."""
    steps = len(film.rewards)
    wanted = [round(i * steps / (MOMENTS - 1)) for i in range(MOMENTS)]
    available = np.array(sorted(film.frames))
    return sorted({int(available[abs(available - step).argmin()]) for step in wanted}) if film.frames else []


def strip_layout(shape: tuple[int, ...], count: int) -> tuple[int, float]:
    """Return the number of columns in which `count` frames are largest, and their total height in inches."""
    height, width = shape

    def height_in(columns: int) -> float:
        return math.ceil(count / columns) * (WIDTH / columns * height / width + CAPTION)

    columns = next((columns for columns in range(1, count) if height_in(columns) <= HEIGHT), count)
    return columns, height_in(columns)


def draw_time(axes: Axes, film: Film, figure: Any) -> None:
    """Draw rewards as bars, shares and gates as lines, with a legend above."""
    steps = np.arange(1, len(film.rewards) + 1)
    axes.set_xlim(0.5, len(steps) + 0.5)
    axes.set_xlabel("step")
    axes.spines[["top"]].set_visible(False)
    if film.shares is not None:
        layers = film.shares.fw[:, 0]
        for layer in layers if len(layers) > 1 else ():
            axes.plot(steps, layer, color=FW, linewidth=0.7, alpha=0.5)
        axes.plot(steps, layers.mean(0), color=FW, linewidth=2, label="FW-memory's share")
        axes.plot(steps, film.shares.gate[:, 0].mean(0), color=FW, lw=1, ls="--", label="mixer's weight of FW")
        axes.set_ylim(0, 1)
        axes.set_ylabel("FW-memory", color=FW)
        figure.legend(frameon=False, loc="outside upper center", ncols=2)
    rewards = axes.twinx() if film.shares is not None else axes
    axes.set_zorder(rewards.get_zorder() + 1)  # lines in front of bars
    axes.patch.set_visible(False)
    rewards.bar(steps, film.rewards, color=REWARD, alpha=0.5, width=0.8)
    rewards.set_ylabel("reward", color=REWARD)
    rewards.spines[["top"]].set_visible(False)


def write_gif(film: Film, path: Path) -> None:
    """Write the frames as a film, with the timeline and a cursor below."""
    steps = sorted(film.frames)
    shown = sorted({*steps[:: math.ceil(len(steps) / FILMED)], steps[-1]})
    zoom = math.ceil(PIXELS / film.frames[0].shape[1])
    width = film.frames[0].shape[1] * zoom
    figure = Figure(figsize=(width / 80, 2.6), dpi=80, layout="constrained")
    axes = figure.add_subplot()
    draw_time(axes, film, figure)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    time = np.asarray(canvas.buffer_rgba())[:, :width, :3]
    pictures = []
    for step in shown:
        line = time.copy()
        x, _ = axes.transData.transform((step + 0.5, 0))
        cursor = int(np.clip(x, 1, line.shape[1] - 2))
        line[len(line) - int(axes.bbox.y1) : len(line) - int(axes.bbox.y0), cursor - 1 : cursor + 1] = (40, 40, 40)
        frame = film.frames[step].repeat(zoom, axis=0).repeat(zoom, axis=1)
        missing = frame.shape[1] - line.shape[1]
        line = np.pad(line, ((0, 0), (0, missing), (0, 0)), constant_values=255)
        pictures.append(Image.fromarray(np.concatenate([frame, line])))
    last = [FRAME_MS] * (len(pictures) - 1) + [10 * FRAME_MS]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=last, loop=0)
