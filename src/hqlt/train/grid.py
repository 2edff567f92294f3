"""A grid of cells, each one model on one task (or in one world) with one seed, run in parallel processes.

A finished cell leaves `cells/NAME.json` and its best weights in `models/NAME`; a grid started again in the same folder
takes those as they are and runs the rest. A worker that dies costs its own cell one more try, and no other cell.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import multiprocessing
import os
import re
import signal
import threading
import traceback
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch

from hqlt.disk import write_atomic
from hqlt.registry import plugin_modules
from hqlt.signals import stop_if_asked, stopping
from hqlt.train.fit import Fit, Progress

TRIES = 2


@dataclass(frozen=True, kw_only=True)
class Cell(ABC):
    """One training run, as JSON can say it: TaskCell's and AgentCell's common part."""

    unit: ClassVar[str]
    """What `Progress.tokens` counts."""
    loss_unit: ClassVar[str] = ""

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
    trained_as: str = ""
    """The label of the model of the same grid that this one is trained as, if not as itself."""
    switched: dict[str, Any] = field(default_factory=dict)
    """What `hqlt.with_retention` is given between training and test; empty: nothing is switched on."""

    @property
    def column(self) -> str:
        return self.experiment or self.task

    @property
    def name(self) -> str:
        """In letters that every file system takes."""
        label = f"{self.column}-{self.model}-seed{self.seed}".lower().replace("β", "beta")
        return re.sub(r"[^a-z0-9.]+", "-", label)

    @property
    def trained(self) -> Cell:
        """The cell that trains what this one tests: itself, unless it is trained as another."""
        return dataclasses.replace(self, model=self.trained_as or self.model, trained_as="", switched={})

    @property
    @abstractmethod
    def metric(self) -> str:
        """Of its scores, as in `hqlt.evaluate.Score`."""

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
    state_bytes: int | None = None
    """What the model holds of one sequence between two calls; None: as much as there is context, or unknown."""


class Event(NamedTuple):
    """The progress of a cell while it runs."""

    cell: Cell
    progress: Progress

    @property
    def in_history(self) -> bool:
        """Whether it stays in the cell's history: validations, and as many others as make a smooth curve."""
        every = max(self.cell.budget.steps // 100, 1)
        return self.progress.validation is not None or self.progress.step % every == 0


class Failure(NamedTuple):
    """Why a cell's worker gave up."""

    traceback: str

    @property
    def reason(self) -> str:
        return self.traceback.strip().splitlines()[-1]


class Ended(NamedTuple):
    """A worker's process is gone."""

    exitcode: int | None


class CellsFailed(RuntimeError):
    """Some cells have no result, whatever was tried."""


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
    Raises ValueError, before anything is written, for fewer than one worker and for results of other cells in the
    folder; Stopped after a first Ctrl-C or SIGTERM; CellsFailed, after all others are done, for cells whose worker
    died or raised in every try.
    """
    if workers < 1:
        raise ValueError(f"workers: expected at least 1, got {workers}")
    results = finished_results(folder, cells)
    (folder / "cells").mkdir(parents=True, exist_ok=True)
    for finished in results.values():
        on_event(finished)
    waiting = [cell for cell in cells if cell.name not in results]
    tries: Counter[str] = Counter()
    reasons: dict[str, str] = {}
    with stopping() as signals, Workers(folder, device) as at_work:
        while waiting or at_work.running:
            stop_if_asked(signals)
            while waiting and len(at_work.running) < workers:
                tries[waiting[0].name] += 1
                at_work.start(waiting.pop(0))
            for cell, message in at_work.messages():
                match message:
                    case Failure():
                        reasons[cell.name] = f"{message.reason} (all of it: {save_failure(folder, cell, message)})"
                    case Ended():  # its result came before, or it failed or died
                        if cell.name not in results and tries[cell.name] < TRIES:
                            waiting.append(cell)
                        elif cell.name not in results:
                            reasons.setdefault(cell.name, f"its process died with exit code {message.exitcode}")
                    case Result():
                        save_result(folder, message)
                        results[cell.name] = message
                        on_event(message)
                    case Event():
                        on_event(message)
    failed = [f"{cell.name}: {reasons[cell.name]}" for cell in cells if cell.name not in results]
    if failed:
        raise CellsFailed(f"{len(failed)} of {len(cells)} cells failed {TRIES} times:\n" + "\n".join(failed))
    return [results[cell.name] for cell in cells]


class Workers:
    """Processes that run a cell each. None outlives the context, nor this process, however it ends."""

    def __init__(self, folder: Path, device: str) -> None:
        self.folder, self.device = folder, device
        self.context: Any = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
        self.running: dict[Connection, tuple[BaseProcess, Cell]] = {}

    def __enter__(self) -> Workers:
        if os.name == "posix":
            from multiprocessing import forkserver

            self.context.set_forkserver_preload(["hqlt.train.task_cell", "hqlt.model.language_model"])
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited: Ctrl-C is ours to answer
            try:
                forkserver.ensure_running()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return self

    def __exit__(self, *_: object) -> None:
        processes = [process for process, _ in self.running.values()]
        for process in processes:
            process.terminate()
        for process in processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()

    def start(self, cell: Cell) -> None:
        ours, theirs = self.context.Pipe(duplex=False)
        process = self.context.Process(
            target=_work, args=(cell, self.folder, self.device, theirs, plugin_modules()), daemon=True
        )
        process.start()
        theirs.close()
        self.running[ours] = process, cell

    def messages(self) -> Iterator[tuple[Cell, Event | Result | Failure | Ended]]:
        """One of each worker that has something to say, within half a second."""
        for pipe in wait(list(self.running), timeout=0.5):
            assert isinstance(pipe, Connection)
            process, cell = self.running[pipe]
            try:
                yield cell, pipe.recv()
            except (EOFError, OSError):  # OSError: it was killed within a message
                process.join()
                del self.running[pipe]
                yield cell, Ended(process.exitcode)


def _work(cell: Cell, folder: Path, device: str, pipe: Connection, modules: Sequence[str]) -> None:
    """One cell, in a process of its own with one thread. modules: to be imported first, for what they register."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    try:
        for module in modules:
            importlib.import_module(module)
        for told in cell.run(folder, device):
            pipe.send(told)
    except BrokenPipeError:
        pass  # the parent is gone
    except Exception:
        pipe.send(Failure(traceback.format_exc()))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def finished_results(folder: Path, cells: Sequence[Cell]) -> dict[str, Result]:
    """By the cell's name. Raises ValueError where the folder holds results of other cells under these names."""
    loaded = {cell.name: load_result(folder, cell) for cell in cells}
    return {name: result for name, result in loaded.items() if result is not None}


def save_failure(folder: Path, cell: Cell, failure: Failure) -> Path:
    place = folder / "cells" / f"{cell.name}.log"
    place.write_text(failure.traceback)
    return place


def save_result(folder: Path, result: Result) -> None:
    """Whole or not at all: written beside its place, then moved there."""
    place = folder / "cells" / f"{result.cell.name}.json"
    write_atomic(place, json.dumps(as_json(result), indent=1).encode())


def load_result(folder: Path, cell: Cell) -> Result | None:
    """The result of this very cell, None where there is none yet.

    Raises ValueError where the folder holds another experiment under the same name, or a file that is no result.
    """
    place = folder / "cells" / f"{cell.name}.json"
    if not place.exists():
        return None
    try:
        kept = json.loads(place.read_text())
        same = _settings(cell) | kept["cell"] == json.loads(json.dumps(asdict(cell)))
        result = result_of(cell, kept) if same else None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{place}: expected the result of a cell as JSON, got {error!r}; remove the file") from None
    if result is None:
        raise ValueError(
            f"{place}: holds the result of a cell with other settings; give another folder, or remove this one"
        )
    return result


def _settings(cell: Cell) -> dict[str, Any]:
    """Those that have a default, by default: an earlier version did not know of all of them."""
    options = {option.name: option for option in dataclasses.fields(cell)}
    made = {name: option.default_factory() for name, option in options.items() if callable(option.default_factory)}
    return made | {name: x.default for name, x in options.items() if x.default is not dataclasses.MISSING}


def result_of(cell: Cell, kept: Mapping[str, Any]) -> Result:
    """From what as_json gave."""
    from hqlt.evaluate import Score

    validation, test = (Score(**kept[split]) for split in ("validation", "test"))
    return Result(
        cell,
        kept["parameters"],
        kept["seconds"],
        Fit(kept["best_step"], validation, test),
        [Progress(**progress) for progress in kept["history"]],
        kept.get("state_bytes"),
    )


def as_json(result: Result) -> dict[str, Any]:
    return {
        "cell": asdict(result.cell),
        "parameters": result.parameters,
        "state_bytes": result.state_bytes,
        "seconds": result.seconds,
        "best_step": result.fit.best_step,
        "validation": result.fit.validation._asdict(),
        "test": result.fit.test._asdict(),
        "history": [progress._asdict() for progress in result.history],
    }
