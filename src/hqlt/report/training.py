"""What is left of a training run: a table, a plot, a page, JSON."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter
from rich.console import Console
from rich.text import Text

from hqlt.report.page import write_page
from hqlt.report.palette import BLUE, GREEN, GREY, VERMILLION
from hqlt.report.plots import save
from hqlt.report.table import Table, TableCell

SHOWN = 40
"""Characters of a prompt in a command to be typed."""


def leave_training_report(
    folder: Path,
    told: dict[str, Any],
    results: dict[str, Any],
    sample: dict[str, Any],
    console: Console,
    kept: dict[str, Any] | None = None,
) -> None:
    """Write results.json, README.md, curves.png and report.html into a run's folder; print the table and the sample.

    told: how the run was made, with its settings; the curves come from the folder's metrics.jsonl. sample: what the
    model generated, as `sample_of` gives it. kept: of `kept_in_text`, for a model that keeps entries.
    """
    history = history_of(folder)
    table = table_of_run(told, results, history)
    leave_report(
        folder,
        told,
        results,
        console,
        title=f"{told['settings']['preset']} on {Path(told['settings']['data']).name}",
        introduction=f"A language model of {told['parameters']:,} parameters, trained from scratch.",
        table=table,
        figure=figure_of_run(history, told["data"]["bytes_per_token"]),
        protocol="Validation text was scored now and then, the test text once, at the end. The last weights are kept.",
        samples=(sample,),
        kept=kept,
    )
    console.print(Text.assemble((sample["prompt"], "dim"), sample["text"], "\n"))
    console.print(f"page: {folder / 'report.html'}", markup=False)
    prompt = " ".join(sample["prompt"].split())[:SHOWN] or "A"
    console.print(f"next: {shlex.join(['hqlt', 'generate', str(folder), f'--prompt={prompt}'])}", markup=False)


def history_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def leave_report(
    folder: Path,
    told: dict[str, Any],
    results: dict[str, Any],
    console: Console,
    *,
    title: str,
    table: Table,
    figure: Figure,
    protocol: str,
    shown: str = "",
    **page: Any,
) -> None:
    """Write results.json, curves.png, README.md and report.html into a run's folder, and print the table.

    shown: what README.md shows below the curves. page: what else `write_page` takes.
    """
    how = json.dumps(told, indent=1, ensure_ascii=False)
    (folder / "results.json").write_text(json.dumps({**results, "run": told}, indent=1))
    plot = save(figure, folder / "curves.png")
    (folder / "README.md").write_text(
        f"# {title}\n\n{table.as_markdown()}\n![Curves](curves.png)\n\n{shown}{protocol}\n\n```\n{how}\n```\n",
        encoding="utf-8",
    )
    write_page(folder / "report.html", title=title, table=table, plot=plot, protocol=protocol, settings=how, **page)
    console.print(table.for_terminal())


def table_of_run(told: dict[str, Any], results: dict[str, Any], history: Sequence[dict[str, Any]]) -> Table:
    settings = told["settings"]
    scores = [results[f"{split}_bits_per_byte"] for split in ("validation", "test")]
    row = [
        settings["preset"],
        f"{told['parameters']:,}",
        f"{history[-1]['tokens']:,}",
        *("–" if bits is None else f"{bits:.4f}" for bits in scores),
        f"{results['updates_left_out']}",
    ]
    columns = ["model", "parameters", "tokens", "validation, bits/byte", "test, bits/byte", "updates skipped"]
    caption = f"Seed {settings['seed']}. Bits per byte: lower is better."
    return Table(columns, [[TableCell(text) for text in row]], caption)


def figure_of_run(history: Sequence[dict[str, Any]], bytes_per_token: float) -> Figure:
    """Bits per byte in training, and in validation where measured; below them gradient and learning rate."""
    figure, (top, bottom) = pyplot.subplots(2, 1, figsize=(6, 5.5), sharex=True, layout="constrained")
    steps = [line["step"] for line in history]
    bits = [(line["loss"] or math.nan) / math.log(2) / bytes_per_token for line in history]
    top.plot(steps, bits, linewidth=0.6, color=GREY, label="training")
    scored = [(line["step"], line["validation"]) for line in history if line["validation"] is not None]
    if scored:
        top.plot(*zip(*scored, strict=True), marker="o", color=VERMILLION, label="validation")
    top.set_ylabel("bits per byte")
    bottom.plot(steps, [line["gradient_norm"] or math.nan for line in history], linewidth=0.6, color=BLUE)
    bottom.set_yscale("log")
    bottom.yaxis.set_major_formatter(LogFormatter())
    bottom.yaxis.set_minor_formatter(LogFormatter())
    bottom.set_ylabel("gradient norm")
    bottom.set_xlabel("updates")
    rate = bottom.twinx()
    rate.plot(steps, [line["learning_rate"] for line in history], color=GREEN)
    rate.set_ylabel("learning rate", color=GREEN)
    top.legend(frameon=False)
    for axes in (top, bottom):
        axes.set_gid("run")
        axes.grid(alpha=0.25)
        axes.spines["top"].set_visible(False)
    return figure
