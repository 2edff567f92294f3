"""Running a study into a folder, and what is left there: JSON, a table, plots, one page."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from hqlt._version import version
from hqlt.run_folder import run_folder
from hqlt.study.study import Study
from hqlt.train.grid import Cell, Event, Result, as_json, load_result, run_grid

EXPORTED = ("README.md", "results.json", "curves.png")


def run_study(
    study: Study, folder: Path, *, again: str, workers: int | None, device: str, console: Console
) -> tuple[list[Result], dict[str, Any]]:
    """Train every cell that the folder does not hold yet; → all results in order, and the settings they came from.

    Ctrl-C leaves the report of what is finished, and says so.

    again: the command that goes on after an interrupt. workers: None takes all cores. Writes config.json and
    metrics.jsonl beside what the grid writes.
    """
    from hqlt.report.live import GridDisplay

    cells = study.cells()
    workers = workers or os.cpu_count() or 1
    settings = settings_of(cells, workers, device)
    console.print(f"{len(cells)} cells on {workers} processes → {folder}", highlight=False)
    begun, finished = time.monotonic(), 0
    with (
        run_folder(folder, "study"),
        (folder / "metrics.jsonl").open("a") as log,
        GridDisplay(len(cells), console) as display,
    ):
        (folder / "config.json").write_text(json.dumps(settings, indent=1))

        def on_event(told: Event | Result) -> None:
            nonlocal finished
            display.on_event(told)
            if isinstance(told, Result):
                finished += 1
            elif told.kept:
                log.write(json.dumps({"cell": told.cell.name, **told.progress._asdict()}) + "\n")

        try:
            results = run_grid(cells, folder, workers, on_event, device)
        except KeyboardInterrupt:
            console.print(
                f"stopped with {finished} of {len(cells)} cells finished; go on with: {again}", highlight=False
            )
            results = [result for cell in cells if (result := load_result(folder, cell)) is not None]
            if results:
                leave_report(study, results, folder, settings, console)
            raise
    console.print(f"{time.monotonic() - begun:.0f} s in all", highlight=False)
    return results, settings


def settings_of(cells: Sequence[Cell], workers: int, device: str) -> dict[str, Any]:
    return {
        "command": shlex.join(["hqlt", *sys.argv[1:]]),
        "workers": workers,
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu",
        "hqlt": version,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{os.cpu_count()} × {platform.machine()}",
        "cells": [dataclasses.asdict(cell) for cell in cells],
    }


def leave_report(
    study: Study,
    results: Sequence[Result],
    folder: Path,
    settings: dict[str, Any],
    console: Console,
    *,
    spoken: dict[str, Any] | None = None,
    samples: Sequence[dict[str, Any]] = (),
) -> None:
    """One table (also as Markdown, README.md), one plot, one page, one JSON file.

    Where results are missing, the title says how many are there.
    """
    from hqlt.report.page import write_page
    from hqlt.report.plots import figure_of, save
    from hqlt.report.table import table_of

    if len(results) < (wanted := len(study.cells())):
        study = dataclasses.replace(study, title=f"{study.title} ({len(results)} of {wanted} runs)")
    table = table_of(results, {label: experiment.paper for label, experiment in study.experiments.items()})
    budgets = [
        f"{label}: {json.dumps(e.options)} {json.dumps(e.common)} {e.budget}" for label, e in study.experiments.items()
    ]
    how = "\n".join(
        [json.dumps({k: v for k, v in settings.items() if k != "cells"}, indent=1, ensure_ascii=False), *budgets]
    )
    protocol = (
        "Checkpoints were chosen by the validation score and tested once. Validation and test sets are the same "
        "for all models and come from other seeds (text: other files) than the training data and each other. "
        "All that was run is in the table."
    )
    (folder / "results.json").write_text(lines_of(as_json(with_few_points(result)) for result in results))
    (folder / "README.md").write_text(
        f"# {study.title}\n\n{study.introduction.strip()}\n\n{table.as_markdown()}\n![Curves](curves.png)\n\n"
        f"{protocol}\n\n```\n{how}\n```\n"
    )
    plot = save(figure_of(results), folder / "curves.png")
    write_page(
        folder / "report.html",
        title=study.title,
        introduction=study.introduction,
        table=table,
        plot=plot,
        spoken=spoken,
        samples=samples,
        protocol=protocol,
        settings=how + "\n" + "\n".join(f"{r.cell.name}: best update {r.fit.best_step}" for r in results),
    )
    console.print(table.for_terminal())
    console.print(f"page: {folder / 'report.html'}    plot: {folder / 'curves.png'}", highlight=False)


def with_few_points(result: Result) -> Result:
    """The result with the validations alone of its history."""
    return result._replace(history=[told for told in result.history if told.validation is not None])


def lines_of(items: Any) -> str:
    """A JSON list with an item a line."""
    return "[\n" + ",\n".join(json.dumps(item) for item in items) + "\n]\n"


def copy_results(folder: Path, to: Path) -> None:
    """Copy what is worth committing: the table, the results and the plot, but no weights and no logs."""
    to.mkdir(parents=True, exist_ok=True)
    for name in EXPORTED:
        shutil.copyfile(folder / name, to / name)
