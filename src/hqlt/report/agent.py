"""Report of an agent's training: curves, a filmed episode, a table, a page, JSON."""

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
    "A greedy episode that is not part of the test: selected frames; below them the reward of each step and the "
    "FW-memory's share of the mixers' output (thick line: mean over layers)."
)
KEPT = " Bottom: for each KV head, how long the entry of each step was kept after it had left the window."


def write_agent_report(
    trainer: AgentTrainer, tested: Evaluation, folder: Path, run_info: dict[str, Any], console: Console
) -> None:
    """Write results.json, README.md, curves.png, episode.png, episode.gif and report.html, and print the table.

    The curves come from the folder's metrics.jsonl.

    Args:
        trainer: with the best weights loaded.
        tested: the test episodes.
        folder: of the run.
        run_info: command, settings and versions of the run.
        console: where to print.
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
    titles = ("An episode", caption), ("The same episode as a film", "One frame per step; also in episode.gif.")
    film_there = "![The same episode as a film](episode.gif)\n\n" if filmed.frames else ""
    write_run_report(
        folder,
        run_info,
        results,
        console,
        title=title,
        introduction=f"An agent with {run_info['parameters']:,} parameters, trained by {settings.algorithm.upper()}.",
        table=table_of_agent(trainer, tested, history[-1]["step"]),
        figure=figure_of_agent(history),
        protocol=f"The agent was evaluated every {settings.evaluate_every:,} steps in the same {settings.episodes} "
        f"greedy episodes. The best weights were tested once, in {len(tested.outcomes)} other episodes.",
        shown=f"![An episode](episode.png)\n\n{caption}\n\n{film_there}",
        pictures=[
            {"title": heading, "caption": text, **picture}
            for (heading, text), picture in zip(titles, pictured, strict=False)
        ],
    )
    console.print(f"page: {folder / 'report.html'}" + (f"    film: {folder / 'episode.gif'}" if filmed.frames else ""))


def table_of_agent(trainer: AgentTrainer, tested: Evaluation, steps: int) -> Table:
    """Build the table of a run, with a single row."""
    settings, success = trainer.settings, finite_or_none(tested.success)
    columns = ["memory", "environment", "steps", "best step", "test return", "test success", "episode length"]
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
    """Plot return, success and entropy of training and evaluation episodes against steps."""
    shown = [
        name for name in ("return", "success", "entropy") if any(value_of(line, name) is not None for line in history)
    ]
    figure, panels = pyplot.subplots(
        len(shown), 1, figsize=(6, 2.3 * len(shown)), sharex=True, layout="constrained", squeeze=False
    )
    for axes, name in zip(panels[:, 0], shown, strict=True):
        played = [(line["step"], value) for line in history if (value := value_of(line, name)) is not None]
        axes.plot(*zip(*played, strict=True), linewidth=0.6, color=GREY, label="training")
        greedy = [(line["step"], value) for line in history if (value := line.get(f"evaluated_{name}")) is not None]
        if greedy:
            axes.plot(
                *zip(*greedy, strict=True), marker="o", markersize=3, color=VERMILLION, label="evaluation (greedy)"
            )
        axes.set_ylabel("entropy of the policy, nats" if name == "entropy" else name)
        axes.set_gid("agent")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0, 0].legend(frameon=False)
    panels[-1, 0].set_xlabel("environment steps")
    return figure


def value_of(line: dict[str, Any], name: str) -> float | None:
    """Return a quantity of the training episodes from a line of metrics.jsonl."""
    return line.get("mean_return" if name == "return" else name)
