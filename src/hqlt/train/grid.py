"""A grid of cells, each one model on one task (or in one world) with one seed, run in parallel processes.

A finished cell leaves `cells/NAME.json` and its best weights in `models/NAME`; a grid started again in the same folder
takes those as they are and runs the rest. A worker that dies costs its own cell one more try, and no other cell.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import signal
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch

from hqlt.disk import write_whole
from hqlt.signals import stopping
from hqlt.train.fit import Fit, Progress

TRIES = 2


@dataclass(frozen=True, kw_only=True)
class Cell(ABC):
    """One training run, as JSON can say it: TaskCell's and AgentCell's common part."""

    unit: ClassVar[str]
    """What `Progress.tokens` counts."""

    model: str
    """The model's label in tables and plots."""
    config: dict[str, Any]
    """What makes the model."""
    task: str
    """Name of the task, or of the world."""
    task_options: dict[str, Any]
    """Its arguments."""
    budget: Any
    """A dataclass with `steps`, in which progress is counted."""
    seed: int = 0
    """Of the weights and of the training data."""
    experiment: str = ""
    """The label of the task with these options in tables and plots; empty: the task's name."""

    @property
    def column(self) -> str:
        return self.experiment or self.task

    @property
    def name(self) -> str:
        """In letters that every file system takes."""
        label = f"{self.column}-{self.model}-seed{self.seed}".lower().replace("β", "beta")
        return re.sub(r"[^a-z0-9.]+", "-", label)

    @property
    @abstractmethod
    def coordinate_name(self) -> str | None:
        """What the test score's curve is drawn against; None: there is no curve."""

    @abstractmethod
    def run(self, folder: Path, device: str) -> Iterator[Event | Result]:
        """Train: yields Events, then the Result, with the weights under `models/NAME` of the folder."""


class Result(NamedTuple):
    """What is kept of a cell that ended."""

    cell: Cell
    parameters: int
    seconds: float
    fit: Fit
    history: list[Progress]
    """Of the events that are kept."""


class Event(NamedTuple):
    """Something that a cell tells while it runs."""

    cell: Cell
    progress: Progress

    @property
    def kept(self) -> bool:
        """Whether it stays in the cell's history: validations, and as many others as make a smooth curve."""
        every = max(self.cell.budget.steps // 100, 1)
        return self.progress.validation is not None or self.progress.step % every == 0


class Failure(NamedTuple):
    """Why a cell's worker gave up."""

    reason: str


def run_grid(
    cells: Sequence[Cell],
    folder: Path,
    workers: int,
    on_event: Callable[[Event | Result], None],
    device: str = "cpu",
) -> list[Result]:
    """Run every cell that has no result in the folder yet; → all results, in the cells' order.

    on_event: called in this process for each progress and each result, those from an earlier start included.
    device: where models are trained, such as "cuda"; all workers share it.
    Raises RuntimeError, after all others are done, for cells whose worker died or raised in every try; ValueError for
    fewer than one worker.
    """
    if workers < 1:
        raise ValueError(f"workers: expected at least 1, got {workers}")
    (folder / "cells").mkdir(parents=True, exist_ok=True)
    results: dict[str, Result] = {}
    waiting: list[tuple[Cell, int]] = []
    for cell in cells:
        finished = load_result(folder, cell)
        if finished is None:
            waiting.append((cell, 1))
        else:
            results[cell.name] = finished
            on_event(finished)

    context: Any = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
    context.set_forkserver_preload(["hqlt.train.task_cell", "hqlt.model.language_model"])
    running: dict[Connection, tuple[BaseProcess, Cell, int]] = {}
    failed: list[str] = []
    reasons: dict[str, str] = {}
    with stopping() as interrupts, contextlib.ExitStack() as at_the_end:
        at_the_end.callback(lambda: _end([process for process, _, _ in running.values()]))
        while waiting or running:
            if interrupts:
                raise KeyboardInterrupt
            while waiting and len(running) < workers:
                cell, attempt = waiting.pop(0)
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_work, args=(cell, folder, device, theirs), daemon=True)
                process.start()
                theirs.close()
                running[ours] = process, cell, attempt
            for pipe in wait(list(running), timeout=0.5):
                assert isinstance(pipe, Connection)
                process, cell, attempt = running[pipe]
                try:
                    message = pipe.recv()
                except EOFError:  # the worker ended: its result came before, or it died
                    process.join()
                    del running[pipe]
                    if cell.name in results:
                        continue
                    if attempt < TRIES:
                        waiting.append((cell, attempt + 1))
                    else:
                        reason = reasons.get(cell.name, f"its process died with exit code {process.exitcode}")
                        failed.append(f"{cell.name}: {reason}")
                    continue
                if isinstance(message, Failure):
                    reasons[cell.name] = message.reason
                    continue
                if isinstance(message, Result):
                    save_result(folder, message)
                    results[cell.name] = message
                on_event(message)
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(cells)} cells failed {TRIES} times:\n" + "\n".join(failed))
    return [results[cell.name] for cell in cells]


def _work(cell: Cell, folder: Path, device: str, pipe: Connection) -> None:
    """One cell, in a process of its own with one thread."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    torch.set_num_threads(1)
    try:
        for told in cell.run(folder, device):
            pipe.send(told)
    except BrokenPipeError:
        pass  # the parent is gone
    except Exception:
        pipe.send(Failure(traceback.format_exc()))


def _end(processes: list[BaseProcess]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        process.join(timeout=5)
        if process.is_alive():
            process.kill()


def save_result(folder: Path, result: Result) -> None:
    """Whole or not at all: written beside its place, then moved there."""
    place = folder / "cells" / f"{result.cell.name}.json"
    write_whole(place, json.dumps(as_json(result), indent=1).encode())


def load_result(folder: Path, cell: Cell) -> Result | None:
    """The result of this very cell, None where there is none yet.

    Raises ValueError where the folder holds another experiment under the same name.
    """
    place = folder / "cells" / f"{cell.name}.json"
    if not place.exists():
        return None
    kept = json.loads(place.read_text())
    if kept["cell"] != json.loads(json.dumps(asdict(cell))):
        raise ValueError(
            f"{place}: holds the result of a cell with other settings; give another folder, or remove this one"
        )
    from hqlt.evaluate import Score

    validation, test = (Score(**kept[split]) for split in ("validation", "test"))
    return Result(
        cell,
        kept["parameters"],
        kept["seconds"],
        Fit(kept["best_step"], validation, test),
        [Progress(**progress) for progress in kept["history"]],
    )


def as_json(result: Result) -> dict[str, Any]:
    return {
        "cell": asdict(result.cell),
        "parameters": result.parameters,
        "seconds": result.seconds,
        "best_step": result.fit.best_step,
        "validation": result.fit.validation._asdict(),
        "test": result.fit.test._asdict(),
        "history": [progress._asdict() for progress in result.history],
    }
