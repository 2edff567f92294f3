"""What is left of an agent's training: curves, an episode to look at, a table, a page, JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot
from matplotlib.figure import Figure
from rich.console import Console

from hqlt.agent.collect import Evaluation
from hqlt.report.episode import film, write_film
from hqlt.report.palette import GREY, VERMILLION
from hqlt.report.table import Table, TableCell
from hqlt.report.training import read_history, write_run_report
from hqlt.train.agent.settings import TEST_SEED
from hqlt.train.agent.trainer import AgentTrainer
from hqlt.train.metrics import finite_or_none

FILM = (
    "A greedy episode that was not scored: moments of it, and below them the reward of each step and the FW-memory's "
    "share of what the mixers put out, the thick line being the mean of the layers."
)
KEPT = " At the bottom, for each KV head, how long each step's entry stayed once it had left the window."


def write_agent_report(
    trainer: AgentTrainer, tested: Evaluation, folder: Path, told: dict[str, Any], console: Console
) -> None:
    """Write results.json, README.md, curves.png, episode.png, episode.gif and report.html, and print the table.

    told: how the run was made; the curves come from the folder's metrics.jsonl.
    """
    settings = trainer.settings
    history = read_history(folder)
    results = {
        "test_return": tested.mean_return,
        "test_success": finite_or_none(tested.success),
        "test_episodes": len(tested.outcomes),
        "best_step": trainer.best_step,
        "steps": history[-1]["step"],
        "updates_left_out": history[-1]["left_out"],
    }
    filmed = film(trainer, TEST_SEED - 1)
    pictured = write_film(filmed, folder)
    title = f"{settings.memory} memory in {settings.env}"
    caption = FILM if filmed.kept is None else FILM + KEPT
    titles = ("An episode", caption), ("The same episode as a film", "Step by step; also as episode.gif.")
    film_there = "![The same episode as a film](episode.gif)\n\n" if filmed.frames else ""
    write_run_report(
        folder,
        told,
        results,
        console,
        title=title,
        introduction=f"An agent of {told['parameters']:,} parameters, trained by {settings.algorithm.upper()}.",
        table=table_of_agent(trainer, tested, history[-1]["step"]),
        figure=figure_of_agent(history),
        protocol=f"Every {settings.evaluate_every:,} steps the same {settings.episodes} greedy episodes were played. "
        f"The weights that did best there are kept, and were tested once, in {len(tested.outcomes)} other episodes.",
        shown=f"![An episode](episode.png)\n\n{caption}\n\n{film_there}",
        pictures=[
            {"title": heading, "caption": said, **picture}
            for (heading, said), picture in zip(titles, pictured, strict=False)
        ],
    )
    console.print(f"page: {folder / 'report.html'}" + (f"    film: {folder / 'episode.gif'}" if filmed.frames else ""))


def table_of_agent(trainer: AgentTrainer, tested: Evaluation, steps: int) -> Table:
    settings, success = trainer.settings, finite_or_none(tested.success)
    columns = ["memory", "world", "steps", "best at", "test return", "test success", "episode, steps"]
    row = [
        settings.memory,
        settings.env,
        f"{steps:,}",
        f"{trainer.best_step:,}",
        f"{tested.mean_return:.2f}",
        "–" if success is None else f"{100 * success:.0f}%",
        f"{tested.mean_length:.0f}",
    ]
    caption = f"{len(tested.outcomes)} greedy episodes, seed {settings.seed}."
    return Table(columns, [[TableCell(text) for text in row]], caption)


def figure_of_agent(history: Sequence[dict[str, Any]]) -> Figure:
    """Return, success and entropy against steps: of the episodes of training, and of the evaluations."""
    told = [
        name for name in ("return", "success", "entropy") if any(value_of(line, name) is not None for line in history)
    ]
    figure, panels = pyplot.subplots(
        len(told), 1, figsize=(6, 2.3 * len(told)), sharex=True, layout="constrained", squeeze=False
    )
    for axes, name in zip(panels[:, 0], told, strict=True):
        played = [(line["step"], value) for line in history if (value := value_of(line, name)) is not None]
        axes.plot(*zip(*played, strict=True), linewidth=0.6, color=GREY, label="training")
        greedy = [(line["step"], value) for line in history if (value := line.get(f"evaluated_{name}")) is not None]
        if greedy:
            axes.plot(*zip(*greedy, strict=True), marker="o", markersize=3, color=VERMILLION, label="greedy")
        axes.set_ylabel("entropy of the policy, nats" if name == "entropy" else name)
        axes.set_gid("agent")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0, 0].legend(frameon=False)
    panels[-1, 0].set_xlabel("steps of the environment, all copies")
    return figure


def value_of(line: dict[str, Any], name: str) -> float | None:
    return line.get("mean_return" if name == "return" else name)
