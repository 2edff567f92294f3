"""Running a study into a folder, and what is left there: JSON, a table, plots, one page."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from rich.console import Console

from hqlt._version import version
from hqlt.disk import check_writable, write_atomic
from hqlt.run_folder import run_folder
from hqlt.signals import Stopped
from hqlt.study.metrics import StudyMetrics
from hqlt.study.study import Study
from hqlt.train.grid import Cell, CellsFailed, Event, Result, as_json, finished_results, run_grid

EXPORTED = ("README.md", "results.json", "curves.png")
PROTOCOL = (
    "Checkpoints were chosen by the validation score and tested once. Validation and test sets are the same "
    "for all models and come from other seeds (text: other files) than the training data and each other. "
    "All that was run is in the table."
)


Additions: TypeAlias = Callable[[Sequence[Result]], Mapping[str, Any]]
"""From all results, what the page shows beside them: more content for `write_page`."""


def run_study(
    study: Study,
    folder: Path,
    *,
    again: str,
    workers: int | None,
    device: str,
    console: Console,
    quick: bool = False,
    export: Path | None = None,
    additions: Additions | None = None,
) -> None:
    """Train every cell that the folder does not hold yet, and leave the report of all in it.

    again: the command that resumes after an interrupt. workers: None takes all cores. quick: the budgets are too small
    to learn, and the report says so. export: where what is worth committing is copied.

    The first Ctrl-C or SIGTERM leaves the report of what is finished, and ends with SystemExit 130 or 143. Raises
    ModuleNotFoundError, ValueError or OSError before anything is trained or written, for a package that is missing,
    for wrong arguments, and for a folder that is not this study's or cannot be written.
    """
    from hqlt.report import page, plots  # noqa: F401  needed at the end: a package that they miss is told now

    cells, workers = study.cells(), os.cpu_count() or 1 if workers is None else workers
    if workers < 1:
        raise ValueError(f"workers: expected at least 1, got {workers}")
    if export is not None:
        check_writable(export, folder=True)
    settings = {"study": study.title, **settings_of(workers, device)}
    report = partial(leave_report, study, folder=folder, settings=settings, console=console, quick=quick)
    with run_folder(folder, "study"):
        check_same_study(study, folder)
        finished_results(folder, cells)
        metrics = StudyMetrics(folder / "metrics.jsonl")
        told = json.dumps(settings | {"cells": [dataclasses.asdict(cell) for cell in cells]}, indent=1)
        write_atomic(folder / "config.json", told.encode())
        console.print(f"{len(cells)} cells on {workers} processes → {folder}", highlight=False, soft_wrap=True)
        begun = time.monotonic()
        try:
            results = train(cells, folder, workers, device, metrics, console)
        except (Stopped, CellsFailed) as error:
            if finished := list(finished_results(folder, cells).values()):
                report(finished)
            raise ended(error, f"{len(finished)} of {len(cells)}", again, console) from None
        console.print(f"{time.monotonic() - begun:.0f} s in all", highlight=False)
        report(results, **(additions(results) if additions else {}))
        if export is not None:  # what is worth committing: no weights and no logs
            export.mkdir(parents=True, exist_ok=True)
            for name in EXPORTED:
                shutil.copyfile(folder / name, export / name)


def train(
    cells: Sequence[Cell], folder: Path, workers: int, device: str, metrics: StudyMetrics, console: Console
) -> list[Result]:
    """The grid, its events on the display and in metrics.jsonl."""
    from hqlt.report.live import GridDisplay

    with contextlib.closing(metrics), GridDisplay(cells, console) as display:

        def on_event(event: Event | Result) -> None:
            display.on_event(event)
            metrics.on_event(event)

        return run_grid(cells, folder, workers, on_event, device)


def ended(error: Stopped | CellsFailed, finished: str, again: str, console: Console) -> SystemExit:
    """What a study that was stopped, or of which cells failed, ends with."""
    if isinstance(error, CellsFailed):
        return SystemExit(f"{error}\ntry these again with: {again}")
    console.print(f"stopped with {finished} cells finished; resume with: {again}", highlight=False, soft_wrap=True)
    return SystemExit(128 + error.number)


def check_same_study(study: Study, folder: Path) -> None:
    """Raises ValueError where the folder holds a study of another title: its report would be overwritten."""
    config = folder / "config.json"
    try:
        title = json.loads(config.read_text()).get("study", study.title) if config.exists() else study.title
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{config}: expected the settings of a study as JSON, got {error}; remove the file") from None
    if title != study.title:
        raise ValueError(f"{folder}: expected a run of {study.title!r}, found one of {title!r}; give another folder")


def settings_of(workers: int, device: str) -> dict[str, Any]:
    return {
        "command": shlex.join(["hqlt", *sys.argv[1:]]),
        "workers": workers,
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu",
        "hqlt": version,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{os.cpu_count()} × {platform.machine()}",
    }


def leave_report(
    study: Study,
    results: Sequence[Result],
    *,
    folder: Path,
    settings: Mapping[str, Any],
    console: Console,
    quick: bool = False,
    **content: Any,
) -> None:
    """One table (also as Markdown, README.md), one plot, one page, one JSON file.

    Where results are missing, the title says how many are there. content: more of it for the page.
    """
    from hqlt.report.page import write_page
    from hqlt.report.plots import figure_of, save
    from hqlt.report.table import table_of

    wanted = len(study.cells())
    title = study.title + (f" ({len(results)} of {wanted} runs)" if len(results) < wanted else "")
    table = table_of(
        results, {label: e.paper for label, e in study.experiments.items()}, quick=quick, sizes=study.sizes
    )
    how = json.dumps(settings, indent=1, ensure_ascii=False)
    for label, e in study.experiments.items():
        how += f"\n{label}: {json.dumps(e.options)} {json.dumps(e.common)} {e.budget}"
    validated = (r._replace(history=[told for told in r.history if told.validation is not None]) for r in results)
    kept = ",\n".join(json.dumps(as_json(result)) for result in validated)
    (folder / "results.json").write_text(f"[\n{kept}\n]\n")
    (folder / "README.md").write_text(
        f"# {title}\n\n{study.introduction.strip()}\n\n{table.as_markdown()}\n![Curves](curves.png)\n\n"
        f"{PROTOCOL}\n\n```\n{how}\n```\n",
        encoding="utf-8",
    )
    write_page(
        folder / "report.html",
        title=title,
        introduction=study.introduction,
        table=table,
        plot=save(figure_of(results), folder / "curves.png"),
        protocol=PROTOCOL,
        settings="\n".join([how, *(f"{r.cell.name}: best update {r.fit.best_step}" for r in results)]),
        **content,
    )
    console.print(table.for_terminal())
    for what, name in (("page", "report.html"), ("plot", "curves.png")):
        console.print(f"{what}: {folder / name}", highlight=False, soft_wrap=True)
