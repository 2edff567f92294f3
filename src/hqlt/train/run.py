"""One run, whatever it trains: folder and lock, checkpoints, Ctrl-C, metrics, a live line, the report at its end."""

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
    """What is trained, and all that this depends on: a trainer that is restored does what this one would have done.

    A kind of run says what follows; all the rest is here.

        updates()          train to the end; whoever iterates may stop, and save, after any update. Raises Stopped where
                           `stopped` says so, and may be saved then too. An update has `step`, `units` (what is counted
                           for the speed) and `as_line()`, flat, for metrics.jsonl and trackers
        due(update)        whether a checkpoint is due after it
        tensors(), told()  what a checkpoint holds: tensors, and JSON beside them
        identity()         what must be the same for a checkpoint to be resumed from, as JSON
        restore(…)         take the tensors of a checkpoint, and what was told with them
        title(), about()   what is trained, in a line; what made it, as JSON: `settings`, and what is worth knowing
        words(…), news(…)  for the live line, the most important first; what is worth a line that stays
    """

    kind: ClassVar[str]
    """Of the run's folder, as in `hqlt.run_folder`."""
    unit: ClassVar[str]
    """What `units` counts."""
    settings: Any
    """A dataclass with `steps`."""
    checkpoints: Checkpoints
    device: torch.device
    size: int
    """Parameters."""
    signals: Sequence[int] = ()
    """Looked at now and then; once there is anything in it, Stopped is raised."""
    extra_state: dict[str, Any]
    """Whatever else is to go into checkpoints, as JSON."""
    _saved: dict[str, Any] | None = None

    @property
    @abstractmethod
    def step(self) -> int:
        """Done so far, of `settings.steps`."""

    @property
    def last_logged_step(self) -> int:
        """The last step whose line in metrics.jsonl stays where the run is resumed from here."""
        return self.step

    @abstractmethod
    def updates(self) -> Iterator[U]: ...
    @abstractmethod
    def due(self, told: U) -> bool: ...
    @abstractmethod
    def tensors(self) -> dict[str, Tensor]: ...
    @abstractmethod
    def metadata(self) -> dict[str, Any]: ...
    @abstractmethod
    def identity(self) -> dict[str, Any]: ...
    @abstractmethod
    def restore(self, place: Path, told: Mapping[str, Any]) -> None: ...
    @abstractmethod
    def title(self) -> str: ...
    @abstractmethod
    def description(self) -> dict[str, Any]: ...
    @abstractmethod
    def status(self, told: U, speed: float) -> list[str]: ...
    @abstractmethod
    def message(self, told: U) -> str | None: ...

    def train(self) -> Iterator[U]:
        """The updates, with checkpoints as they are due."""
        for told in self.updates():
            yield told
            if self.due(told):
                self.save()
            self.checkpoints.poll()
        self.checkpoints.wait()

    def save(self) -> None:
        """Begin a checkpoint of this moment, unless there is one."""
        moment = {"step": self.step, **self.extra_state, **self.metadata()}
        if moment != self._saved:
            self._saved = moment
            self.checkpoints.save(self.step, self.tensors(), {**moment, "run": self.identity()})

    def resume(self) -> int | None:
        """Resume from the newest checkpoint; → its step, None where there is none.

        Raises ValueError where it is damaged, or of another run; nothing is changed then.
        """
        place = self.checkpoints.newest()
        if place is None:
            return None
        told = self.checkpoints.metadata(place)
        there, asked = flattened(told["run"]), flattened(self.identity())
        for name in [name for name in there | asked if there.get(name) != asked.get(name)]:
            raise ValueError(
                f"{place}: is of a run with another {name}: {there.get(name)!r}, not {asked.get(name)!r}. "
                f"Give another folder for a new run, or the settings of the old one to go on with it."
            )
        try:
            self.restore(place, told)
            self.extra_state = {name: told[name] for name in self.extra_state}
        except (RuntimeError, KeyError, TypeError) as error:
            raise ValueError(f"{place}: expected a checkpoint of this run: {error}; {recovery_hint(place)}") from error
        self._saved = {"step": self.step, **self.extra_state, **self.metadata()}
        return self.step


T = TypeVar("T", bound=Trainer[Any])
Finish = Callable[[T, Path, dict[str, Any], Console], None]
"""Of a trainer that has done its steps: (trainer, folder, how the run was made, console)."""


def run(
    kind: str,
    folder: Path,
    build: Callable[[Console], T],
    finish: Finish[T],
    *,
    first: bool = True,
    wandb: bool = False,
) -> None:
    """Train into the folder, resuming from its newest checkpoint if there is one; then test and report.

    The first Ctrl-C or SIGTERM saves and ends with status 130 or 143, a second one ends at once.

    kind: of the folder. build: makes the trainer; refuses, before anything is written, what cannot be trained. first:
    whether this is the process that prints and writes. wandb: whether it reports to Weights & Biases.
    """
    if wandb:
        require("wandb")
    with run_folder(folder, kind) if first else contextlib.nullcontext():
        console = Console(highlight=False, soft_wrap=True, quiet=not first)
        trainer = build(console)
        resumed = trainer.resume()
        told = run_info(trainer)
        if first:
            write_atomic(folder / "config.json", json.dumps(told, indent=1).encode())
        since = f", resuming after step {resumed:,}" if resumed else ""
        console.print(f"{trainer.title()} → {folder}{since}", markup=False)
        with stopping() as trainer.signals:
            try:
                train_and_log(trainer, folder, console, first, wandb)
                finish(trainer, folder, told, console)
            except Stopped as stopped:
                trainer.save()
                trainer.checkpoints.wait()
                console.print(f"stopped and saved after step {trainer.step}; the same command resumes")
                sys.exit(128 + stopped.number)


def train_and_log(trainer: Trainer[Any], folder: Path, console: Console, first: bool, wandb: bool = False) -> None:
    """Train; the first process reports each update: the live line, metrics.jsonl, trackers."""
    if not first:
        for _ in trainer.train():
            pass
        return
    begun, speed_of, done = time.monotonic(), Speed(), trainer.step
    settings = trainer.description()["settings"]
    with contextlib.ExitStack() as stack:
        metrics = stack.enter_context(contextlib.closing(Metrics(folder / "metrics.jsonl", trainer.last_logged_step)))
        trackers = stack.enter_context(contextlib.closing(Trackers(folder, settings, done, wandb)))
        line = stack.enter_context(LiveLine(console, trainer.settings.steps, done))
        for told in trainer.train():
            speed = speed_of.at(told.units)
            line.show(told.step, trainer.status(told, speed), trainer.message(told))
            metrics.write(told.as_line())
            trackers.write(told.as_line() | {f"{trainer.unit}_per_second": speed})
    console.print(f"{time.monotonic() - begun:.0f} s in this start")


def run_info(trainer: Trainer[Any]) -> dict[str, Any]:
    """What made a run, as JSON: its command and settings, and what it ran on."""
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


def flattened(told: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a mapping and of those in it: {"model": {"window": 4}} has model.window."""
    fields: dict[str, Any] = {}
    for name, value in told.items():
        inner = flattened(value) if isinstance(value, Mapping) else None
        fields |= {name: value} if inner is None else {f"{name}.{field}": inner[field] for field in inner}
    return fields
