"""A grid of cells, each one model on one task (or environment) with one seed, run in parallel processes.

A finished cell is saved in `cells/NAME.json`, with its best weights in `models/NAME`. Running the grid again in the
same folder reuses these results and runs the remaining cells. If a worker dies, only its cell is run again.
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

MAX_TRIES = 2


@dataclass(frozen=True, kw_only=True)
class Cell(ABC):
    """One training run, described by JSON values: the base class of TaskCell and AgentCell."""

    unit: ClassVar[str]
    """Unit of `Progress.tokens`."""
    loss_unit: ClassVar[str] = ""
    """Unit of the loss; empty: none."""

    model: str
    """The model's label in tables and plots."""
    config: dict[str, Any]
    """Options of the model."""
    task: str
    """Name of the task, or of the world."""
    task_options: dict[str, Any]
    """Options of the task or environment."""
    budget: Any
    """A dataclass with a field `steps`, in which progress is counted."""
    seed: int = 0
    """Seed of the weights and of the training data."""
    experiment: str = ""
    """The task's label in tables and plots; empty: its name."""
    trained_as: str = ""
    """Label of the model of the same grid whose weights are tested; empty: this model is trained itself."""
    switched: dict[str, Any] = field(default_factory=dict)
    """Options of `hqlt.with_retention`, which is applied between training and test; empty: it is not applied."""

    @property
    def column(self) -> str:
        """The label of the task."""
        return self.experiment or self.task

    @property
    def name(self) -> str:
        """A name that is valid on every file system."""
        label = f"{self.column}-{self.model}-seed{self.seed}".lower().replace("β", "beta")
        return re.sub(r"[^a-z0-9.]+", "-", label)

    @property
    def trained(self) -> Cell:
        """The cell whose weights are tested: this cell, unless `trained_as` names another."""
        return dataclasses.replace(self, model=self.trained_as or self.model, trained_as="", switched={})

    @property
    @abstractmethod
    def metric(self) -> str:
        """Name of the metric, as in `hqlt.evaluate.Score`."""

    @property
    @abstractmethod
    def coordinate_name(self) -> str | None:
        """What the curve of test scores is plotted against; None: there is no curve."""

    @abstractmethod
    def run(self, folder: Path, device: str) -> Iterator[Event | Result]:
        """Train, yield Events, then the Result; saves the weights in `models/NAME` in the folder."""


class Result(NamedTuple):
    """The result of a finished cell."""

    cell: Cell
    parameters: int
    seconds: float
    fit: Fit
    history: list[Progress]
    """Progress of the events with `in_history`."""
    state_bytes: int | None = None
    """Size of the state of one sequence; None: it grows with the context, or is unknown."""


class Event(NamedTuple):
    """Progress of a running cell."""

    cell: Cell
    progress: Progress

    @property
    def in_history(self) -> bool:
        """Whether it is saved in the cell's history: all validations, and about 100 others."""
        every = max(self.cell.budget.steps // 100, 1)
        return self.progress.validation is not None or self.progress.step % every == 0


class Failure(NamedTuple):
    """An exception in a cell's worker."""

    traceback: str

    @property
    def reason(self) -> str:
        """The last line of the traceback."""
        return self.traceback.strip().splitlines()[-1]


class Ended(NamedTuple):
    """A worker's process has ended."""

    exitcode: int | None


class CellsFailed(RuntimeError):
    """Some cells failed in every try."""


def run_grid(
    cells: Sequence[Cell],
    folder: Path,
    workers: int,
    on_event: Callable[[Event | Result], None],
    device: str = "cpu",
) -> list[Result]:
    """Run all cells that have no result in the folder yet.

    Args:
        cells: the cells of the grid.
        folder: where results and weights are saved.
        workers: number of parallel processes.
        on_event: called in this process for each Event and each Result, including results of earlier runs.
        device: the device that all workers share, such as "cuda".

    Returns:
        All results, in the order of the cells.

    Raises:
        ValueError: if there is less than one worker, or the folder has results of cells with other settings; nothing
            is written.
        Stopped: after the first Ctrl-C or SIGTERM.
        CellsFailed: after all other cells, if the worker of a cell died or raised in every try.
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
                        reasons[cell.name] = f"{message.reason} (traceback: {save_failure(folder, cell, message)})"
                    case Ended():  # after its result or failure, or because it died
                        if cell.name not in results and tries[cell.name] < MAX_TRIES:
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
        raise CellsFailed(f"{len(failed)} of {len(cells)} cells failed {MAX_TRIES} times:\n" + "\n".join(failed))
    return [results[cell.name] for cell in cells]


class Workers:
    """Processes that run one cell each. All end with the context and with this process, however it ends."""

    def __init__(self, folder: Path, device: str) -> None:
        self.folder, self.device = folder, device
        self.context: Any = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
        self.running: dict[Connection, tuple[BaseProcess, Cell]] = {}

    def __enter__(self) -> Workers:
        if os.name == "posix":
            from multiprocessing import forkserver

            self.context.set_forkserver_preload(["hqlt.train.task_cell", "hqlt.model.language_model"])
            before = signal.pthread_sigmask(
                signal.SIG_BLOCK, {signal.SIGINT}
            )  # inherited: only this process handles Ctrl-C
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
        """Start a process for a cell."""
        ours, theirs = self.context.Pipe(duplex=False)
        process = self.context.Process(
            target=_work, args=(cell, self.folder, self.device, theirs, plugin_modules()), daemon=True
        )
        process.start()
        theirs.close()
        self.running[ours] = process, cell

    def messages(self) -> Iterator[tuple[Cell, Event | Result | Failure | Ended]]:
        """One message from each worker that has one, waiting at most half a second."""
        for pipe in wait(list(self.running), timeout=0.5):
            assert isinstance(pipe, Connection)
            process, cell = self.running[pipe]
            try:
                yield cell, pipe.recv()
            except (EOFError, OSError):  # OSError: killed while sending a message
                process.join()
                del self.running[pipe]
                yield cell, Ended(process.exitcode)


def _work(cell: Cell, folder: Path, device: str, pipe: Connection, modules: Sequence[str]) -> None:
    """Run one cell, with one thread, in this process. modules: imported first, for what they register."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    try:
        for module in modules:
            importlib.import_module(module)
        for message in cell.run(folder, device):
            pipe.send(message)
    except BrokenPipeError:
        pass  # the parent has ended
    except Exception:
        pipe.send(Failure(traceback.format_exc()))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def finished_results(folder: Path, cells: Sequence[Cell]) -> dict[str, Result]:
    """Results by the cell's name. Raises ValueError if the folder has results of other cells under these names."""
    loaded = {cell.name: load_result(folder, cell) for cell in cells}
    return {name: result for name, result in loaded.items() if result is not None}


def save_failure(folder: Path, cell: Cell, failure: Failure) -> Path:
    place = folder / "cells" / f"{cell.name}.log"
    place.write_text(failure.traceback)
    return place


def save_result(folder: Path, result: Result) -> None:
    """Write the result atomically."""
    place = folder / "cells" / f"{result.cell.name}.json"
    write_atomic(place, json.dumps(as_json(result), indent=1).encode())


def load_result(folder: Path, cell: Cell) -> Result | None:
    """The result of this cell; None: there is none yet.

    Raises ValueError if the file is invalid, or is the result of a cell with other settings.
    """
    place = folder / "cells" / f"{cell.name}.json"
    if not place.exists():
        return None
    try:
        saved = json.loads(place.read_text())
        same = _defaults(cell) | saved["cell"] == json.loads(json.dumps(asdict(cell)))
        result = result_of(cell, saved) if same else None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{place}: expected the result of a cell as JSON, got {error!r}; remove the file") from None
    if result is None:
        raise ValueError(
            f"{place}: has the result of a cell with other settings; give another folder, or remove this one"
        )
    return result


def _defaults(cell: Cell) -> dict[str, Any]:
    """The default values of fields: files of earlier versions do not have all of them."""
    options = {option.name: option for option in dataclasses.fields(cell)}
    factories = {name: option.default_factory() for name, option in options.items() if callable(option.default_factory)}
    return factories | {name: x.default for name, x in options.items() if x.default is not dataclasses.MISSING}


def result_of(cell: Cell, saved: Mapping[str, Any]) -> Result:
    """The inverse of `as_json`."""
    from hqlt.evaluate import Score

    validation, test = (Score(**saved[split]) for split in ("validation", "test"))
    return Result(
        cell,
        saved["parameters"],
        saved["seconds"],
        Fit(saved["best_step"], validation, test),
        [Progress(**progress) for progress in saved["history"]],
        saved.get("state_bytes"),
    )


def as_json(result: Result) -> dict[str, Any]:
    """A result as JSON values."""
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
