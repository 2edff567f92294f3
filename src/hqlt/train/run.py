"""The common part of all training runs: folder, checkpoints, Ctrl-C, metrics, live status, final report."""

from __future__ import annotations

import contextlib
import json
import platform
import shlex
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from rich.console import Console
from torch import Tensor

from hqlt._version import version
from hqlt.disk import write_atomic
from hqlt.errors import require
from hqlt.run_folder import run_folder
from hqlt.signals import Stopped, stopping
from hqlt.train.checkpoints import Checkpoints, recovery_hint
from hqlt.train.live import LiveLine, Speed
from hqlt.train.metrics import Metrics, Trackers

U = TypeVar("U", bound=Any)


class Trainer(ABC, Generic[U]):
    """The base class of trainers. A restored trainer continues exactly as the saved one would have.

    Subclasses define:

        updates()              train to the end, yielding an update after each step. The caller may stop and save after
                               any of them. Raises Stopped if `signals` is not empty; the trainer can be saved then,
                               too. An update has `step`, `units` (a count for the speed) and `as_line()`, a flat dict
                               for metrics.jsonl and trackers
        due(update)            whether to save a checkpoint after the update
        tensors(), metadata()  the contents of a checkpoint: tensors, and JSON values
        identity()             what must be equal for a checkpoint to be resumed from, as JSON
        restore(…)             load a checkpoint
        title()                one line that says what is trained
        description()          how it is trained, as JSON: `settings` and other information
        status(…)              values for the live status line, the most important first
        message(…)             a permanent line for the log; None: none
    """

    kind: ClassVar[str]
    """Kind of run folder, as in `hqlt.run_folder`."""
    unit: ClassVar[str]
    """Unit of `units`."""
    settings: Any
    """A dataclass with `steps`."""
    checkpoints: Checkpoints
    device: torch.device
    size: int
    """Number of parameters."""
    signals: Sequence[int] = ()
    """Signals received; once there is one, `updates` raises Stopped."""
    extra_state: dict[str, Any]
    """Additional JSON values to save in checkpoints."""
    _saved: dict[str, Any] | None = None

    @property
    @abstractmethod
    def step(self) -> int:
        """Number of finished steps, of `settings.steps`."""

    @property
    def last_logged_step(self) -> int:
        """The last step whose line in metrics.jsonl is kept when the run resumes from here."""
        return self.step

    @abstractmethod
    def updates(self) -> Iterator[U]: ...
    @abstractmethod
    def due(self, update: U) -> bool: ...
    @abstractmethod
    def tensors(self) -> dict[str, Tensor]: ...
    @abstractmethod
    def metadata(self) -> dict[str, Any]: ...
    @abstractmethod
    def identity(self) -> dict[str, Any]: ...
    @abstractmethod
    def restore(self, place: Path, metadata: Mapping[str, Any]) -> None: ...
    @abstractmethod
    def title(self) -> str: ...
    @abstractmethod
    def description(self) -> dict[str, Any]: ...
    @abstractmethod
    def status(self, update: U, speed: float) -> list[str]: ...
    @abstractmethod
    def message(self, update: U) -> str | None: ...

    def train(self) -> Iterator[U]:
        """Run all updates and save checkpoints when due."""
        for update in self.updates():
            yield update
            if self.due(update):
                self.save()
            self.checkpoints.poll()
        self.checkpoints.wait()

    def save(self) -> None:
        """Save a checkpoint of the current state, unless it is already saved."""
        state = {"step": self.step, **self.extra_state, **self.metadata()}
        if state != self._saved:
            self._saved = state
            self.checkpoints.save(self.step, self.tensors(), {**state, "run": self.identity()})

    def resume(self) -> int | None:
        """Resume from the newest checkpoint and return its step; None: there is none.

        Raises ValueError if it is damaged or belongs to another run.
        """
        place = self.checkpoints.newest()
        if place is None:
            return None
        metadata = self.checkpoints.metadata(place)
        saved, current = flattened(metadata["run"]), flattened(self.identity())
        for name in [name for name in saved | current if saved.get(name) != current.get(name)]:
            raise ValueError(
                f"{place}: belongs to a run with another {name}: expected {saved.get(name)!r}, got "
                f"{current.get(name)!r}. Give another folder for a new run, or use the old settings to resume."
            )
        try:
            self.restore(place, metadata)
            self.extra_state = {name: metadata[name] for name in self.extra_state}
        except (RuntimeError, KeyError, TypeError) as error:
            raise ValueError(f"{place}: expected a checkpoint of this run: {error}; {recovery_hint(place)}") from error
        self._saved = {"step": self.step, **self.extra_state, **self.metadata()}
        return self.step


T = TypeVar("T", bound=Trainer[Any])
Finish = Callable[[T, Path, dict[str, Any], Console], None]
"""Called when training is finished: (trainer, folder, run info, console)."""


def run(
    kind: str,
    folder: Path,
    build: Callable[[Console], T],
    finish: Finish[T],
    *,
    first: bool = True,
    wandb: bool = False,
) -> None:
    """Train in the folder, resuming from its newest checkpoint if there is one, then test and write the report.

    The first Ctrl-C or SIGTERM saves a checkpoint and exits with status 130 or 143; a second one exits at once.

    kind: kind of run folder. build: creates the trainer; raises an error for invalid settings before anything is
    written. finish: tests and reports. first: whether this process prints and writes. wandb: whether
    to log to Weights & Biases.
    """
    if wandb:
        require("wandb")
    with run_folder(folder, kind) if first else contextlib.nullcontext():
        console = Console(highlight=False, soft_wrap=True, quiet=not first)
        trainer = build(console)
        resumed = trainer.resume()
        info = run_info(trainer)
        if first:
            write_atomic(folder / "config.json", json.dumps(info, indent=1).encode())
        since = f", resuming after step {resumed:,}" if resumed else ""
        console.print(f"{trainer.title()} → {folder}{since}", markup=False)
        with stopping() as trainer.signals:
            try:
                train_and_log(trainer, folder, console, first, wandb)
                finish(trainer, folder, info, console)
            except Stopped as stopped:
                trainer.save()
                trainer.checkpoints.wait()
                console.print(f"stopped and saved after step {trainer.step}; run the same command again to resume")
                sys.exit(128 + stopped.number)


def train_and_log(trainer: Trainer[Any], folder: Path, console: Console, first: bool, wandb: bool = False) -> None:
    """Train. The first process reports each update: live status, metrics.jsonl, trackers."""
    if not first:
        for _ in trainer.train():
            pass
        return
    start, speedometer, done = time.monotonic(), Speed(), trainer.step
    settings = trainer.description()["settings"]
    with contextlib.ExitStack() as stack:
        metrics = stack.enter_context(contextlib.closing(Metrics(folder / "metrics.jsonl", trainer.last_logged_step)))
        trackers = stack.enter_context(contextlib.closing(Trackers(folder, settings, done, wandb)))
        line = stack.enter_context(LiveLine(console, trainer.settings.steps, done))
        for update in trainer.train():
            speed = speedometer.at(update.units)
            line.show(update.step, trainer.status(update, speed), trainer.message(update))
            metrics.write(update.as_line())
            trackers.write(update.as_line() | {f"{trainer.unit}_per_second": speed})
    console.print(f"trained for {time.monotonic() - start:.0f} s")


def run_info(trainer: Trainer[Any]) -> dict[str, Any]:
    """How a run was made, as JSON: command, settings, device and versions."""
    device = trainer.device
    return {
        "command": shlex.join(["hqlt", *sys.argv[1:]]),
        **trainer.description(),
        "parameters": trainer.size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "hqlt": version,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def flattened(nested: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a nested mapping by dotted names, such as {"model.window": 4}."""
    fields: dict[str, Any] = {}
    for name, value in nested.items():
        inner = flattened(value) if isinstance(value, Mapping) else None
        fields |= {name: value} if inner is None else {f"{name}.{field}": inner[field] for field in inner}
    return fields
