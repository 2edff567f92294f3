"""Pictures and films of an episode: sizes of frames, legends, and episodes of any length."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from matplotlib import pyplot
from PIL import Image

from hqlt.agent import PPOSettings
from hqlt.report import episode
from hqlt.report.episode import WIDTH, Film, figure_of_film, film, moments, strip_layout, write_film
from hqlt.report.kept import KeptPairs
from hqlt.report.shares import Shares
from hqlt.train.agent import AgentSettings, AgentTrainer


def film_of(steps, shape=(5, 28), shares=True):
    """Make a film whose frames are filled with their number."""
    frames = {step: np.full((*shape, 3), step % 256, np.uint8) for step in range(steps + 1)}
    share = Shares(torch.rand(2, 1, steps), torch.rand(2, 1, steps)) if shares else None
    return Film(frames, np.linspace(-1, 1, steps, dtype=np.float32), share, 1.0)


@pytest.mark.parametrize(("shape", "columns"), [((60, 336), 3), ((112, 176), 5), ((400, 600), 5), ((60, 1236), 2)])
def test_frames_are_arranged_as_large_as_possible(shape, columns):
    """For example three T-mazes per row, not nine."""
    assert strip_layout(shape, 9)[0] == columns
    figure = figure_of_film(film_of(40, shape))
    figure.canvas.draw()
    shown = [axes for part in figure.subfigs[:1] for axes in part.axes if axes.images]
    assert len(shown) == 9
    widths = [axes.get_window_extent().width / figure.dpi for axes in shown]
    assert min(widths) > 0.8 * WIDTH / columns
    pyplot.close(figure)


@pytest.mark.parametrize("width", [28, 336, 700])
def test_the_legend_of_a_film_is_complete(width):
    """The film is made wide enough for it."""
    figures = []
    original = episode.Figure
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(episode, "Figure", lambda **options: figures.append(original(**options)) or figures[-1])
        patch.setattr(Image.Image, "save", lambda *arguments, **options: None)
        episode.write_gif(film_of(12, (5, width)), None)
    (figure,) = figures
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
    assert figure.bbox.width >= 640


@pytest.mark.parametrize("shares", [True, False])
@pytest.mark.parametrize("steps", [1, 2, 30])
def test_files_of_a_film(tmp_path, steps, shares):
    pictures = write_film(film_of(steps, shares=shares), tmp_path)
    assert [list(picture) for picture in pictures] == [["plot"], ["film"]]
    assert pictures[0]["plot"].count("<svg") == min(steps + 1, 9) + 1 + 2 * shares, "frames, timeline, legend"
    assert pictures[1]["film"].startswith("data:image/gif;base64,")
    with Image.open(tmp_path / "episode.gif") as gif:
        assert gif.n_frames == steps + 1 and gif.width >= 640


def test_kept_entries_are_drawn_below_the_same_steps():
    index = torch.arange(30).expand(4, 1, 30)
    pairs = KeptPairs((index + 9).clamp(max=30), (index + 4).clamp(max=30), [(i, j) for i in (0, 1) for j in (0, 1)])
    figure = figure_of_film(film_of(30)._replace(kept=pairs))
    below, kept, *_ = figure.subfigs[1].axes
    figure.canvas.draw()
    assert below.get_xlim() == kept.get_xlim() == (0.5, 30.5) and kept.get_xlabel().startswith("step")
    assert below.bbox.x0 == kept.bbox.x0 and below.bbox.x1 == kept.bbox.x1 and below.bbox.y0 > kept.bbox.y1
    pyplot.close(figure)


def test_a_film_of_an_agent_with_a_retention():
    kept = {"hidden_size": 8, "window": 2, "retention": "surprise", "kept": 3}
    ppo = PPOSettings(rollout_steps=8, hidden_sizes=(8,))
    settings = AgentSettings(options={"corridor": 9}, model=kept, num_envs=1, hyperparameters=ppo)
    filmed = film(AgentTrainer(settings), seed=0)
    steps = len(filmed.rewards)
    assert filmed.kept.until.shape == (4, 1, steps) and filmed.shares.fw.shape == (2, 1, steps)
    held = (filmed.kept.until == steps) & (filmed.kept.leaves < steps)
    assert (held.sum(dim=-1) == 3).all()


def test_an_environment_without_frames_has_a_picture_of_its_rewards(tmp_path):
    blind = film_of(5)._replace(frames={})
    assert len(write_film(blind, tmp_path)) == 1 and moments(blind) == []
    assert [path.name for path in tmp_path.iterdir()] == ["episode.png"]


def test_frames_of_a_long_episode_are_equally_spaced(monkeypatch):
    """At most twice as many are held as a film shows; the first and the last are always included."""
    monkeypatch.setattr(episode, "FILMED", 5)
    ppo = PPOSettings(rollout_steps=8, hidden_sizes=(8,))
    trainer = AgentTrainer(
        AgentSettings(options={"corridor": 69}, model={"hidden_size": 8}, num_envs=1, hyperparameters=ppo)
    )
    filmed = film(trainer, seed=0)
    assert len(filmed.rewards) == 70
    assert list(filmed.frames) == [0, 8, 16, 24, 32, 40, 48, 56, 64, 70]
    assert moments(filmed) == [0, 8, 16, 24, 32, 40, 48, 64, 70]
