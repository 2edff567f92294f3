"""Run a study in a folder, and write its report there: JSON, a table, plots and an HTML page."""

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
    "Checkpoints were selected by validation score and tested once. Validation and test sets are the same for all "
    "models. Training, validation and test data come from different seeds (text: from different files). The table "
    "contains every run."
)


Additions: TypeAlias = Callable[[Sequence[Result]], Mapping[str, Any]]
"""Makes additional content of the page, as `write_page` takes it, from all results."""


def run_study(
    study: Study,
    folder: Path,
    *,
    resume_command: str,
    workers: int | None,
    device: str,
    console: Console,
    quick: bool = False,
    export: Path | None = None,
    additions: Additions | None = None,
) -> None:
    """Train every cell whose result is not in the folder yet, and write the report of all cells.

    Args:
        study: the study.
        folder: holds results, models and the report; an unfinished run of the study is resumed.
        resume_command: the command to print if the study is stopped.
        workers: number of parallel processes; None for the number of cores.
        device: device for training.
        console: where progress and the table are printed.
        quick: whether the budgets are too small to learn; the report then says so and marks no best score.
        export: folder for a copy of the files that are worth committing.
        additions: makes additional content of the page.

    Raises:
        SystemExit: if the study is stopped by Ctrl-C (130) or SIGTERM (143), or if cells failed; the report of the
            finished cells is written first.
        ModuleNotFoundError, ValueError, OSError: before anything is trained or written, for a missing package, wrong
            arguments, or a folder that cannot be written or belongs to another study.
    """
    from hqlt.report import page, plots  # noqa: F401  used at the end; a missing package is reported now

    cells, workers = study.cells(), os.cpu_count() or 1 if workers is None else workers
    if workers < 1:
        raise ValueError(f"workers: expected at least 1, got {workers}")
    if export is not None:
        check_writable(export, folder=True)
    settings = {"study": study.title, **collect_settings(workers, device)}
    report = partial(write_report, study, folder=folder, settings=settings, console=console, quick=quick)
    with run_folder(folder, "study"):
        check_same_study(study, folder)
        finished_results(folder, cells)
        metrics = StudyMetrics(folder / "metrics.jsonl")
        config = json.dumps(settings | {"cells": [dataclasses.asdict(cell) for cell in cells]}, indent=1)
        write_atomic(folder / "config.json", config.encode())
        console.print(f"{len(cells)} cells on {workers} processes → {folder}", highlight=False, soft_wrap=True)
        started = time.monotonic()
        try:
            results = train(cells, folder, workers, device, metrics, console)
        except (Stopped, CellsFailed) as error:
            if finished := list(finished_results(folder, cells).values()):
                report(finished)
            raise exit_with(error, f"{len(finished)} of {len(cells)}", resume_command, console) from None
        console.print(f"finished in {time.monotonic() - started:.0f} s", highlight=False)
        report(results, **(additions(results) if additions else {}))
        if export is not None:  # neither weights nor logs
            export.mkdir(parents=True, exist_ok=True)
            for name in EXPORTED:
                shutil.copyfile(folder / name, export / name)


def train(
    cells: Sequence[Cell], folder: Path, workers: int, device: str, metrics: StudyMetrics, console: Console
) -> list[Result]:
    """Run the grid; its events go to the display and to metrics.jsonl."""
    from hqlt.report.live import GridDisplay

    with contextlib.closing(metrics), GridDisplay(cells, console) as display:

        def on_event(event: Event | Result) -> None:
            display.on_event(event)
            metrics.on_event(event)

        return run_grid(cells, folder, workers, on_event, device)


def exit_with(error: Stopped | CellsFailed, finished: str, resume_command: str, console: Console) -> SystemExit:
    """Make the exception that ends a study which was stopped or has failed cells."""
    if isinstance(error, CellsFailed):
        return SystemExit(f"{error}\nrun these again with: {resume_command}")
    message = f"stopped with {finished} cells finished; resume with: {resume_command}"
    console.print(message, highlight=False, soft_wrap=True)
    return SystemExit(128 + error.number)


def check_same_study(study: Study, folder: Path) -> None:
    """Raise ValueError if the folder holds a study with another title, whose report would be overwritten."""
    config = folder / "config.json"
    try:
        title = json.loads(config.read_text()).get("study", study.title) if config.exists() else study.title
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{config}: expected the settings of a study as JSON, got {error}; remove the file") from None
    if title != study.title:
        raise ValueError(f"{folder}: expected a run of {study.title!r}, found one of {title!r}; give another folder")


def collect_settings(workers: int, device: str) -> dict[str, Any]:
    """Record the command, versions and hardware."""
    return {
        "command": shlex.join(["hqlt", *sys.argv[1:]]),
        "workers": workers,
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu",
        "hqlt": version,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{os.cpu_count()} × {platform.machine()}",
    }


def write_report(
    study: Study,
    results: Sequence[Result],
    *,
    folder: Path,
    settings: Mapping[str, Any],
    console: Console,
    quick: bool = False,
    **content: Any,
) -> None:
    """Write README.md, results.json, curves.png and report.html, and print the table.

    If results are missing, the title says how many there are.

    Args:
        study: the study.
        results: of all finished cells.
        folder: where the files are written.
        settings: what `collect_settings` returns.
        console: where the table is printed.
        quick: whether the budgets are too small to learn.
        content: additional content of the page.
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
    validated = (r._replace(history=[p for p in r.history if p.validation is not None]) for r in results)
    lines = ",\n".join(json.dumps(as_json(result)) for result in validated)
    (folder / "results.json").write_text(f"[\n{lines}\n]\n")
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
        settings="\n".join([how, *(f"{r.cell.name}: best checkpoint at step {r.fit.best_step}" for r in results)]),
        **content,
    )
    console.print(table.for_terminal())
    for kind, name in (("page", "report.html"), ("plot", "curves.png")):
        console.print(f"{kind}: {folder / name}", highlight=False, soft_wrap=True)
