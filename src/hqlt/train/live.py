"""The live status line of a run."""

from __future__ import annotations

import itertools
import resource
import sys
import time
from collections.abc import Sequence
from typing import Self

import torch
from rich.console import Console
from rich.live import Live
from rich.progress import Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

LOG_SECONDS = 30
"""Interval between status lines in a log, unless there is a message."""
SPEED_WINDOW = 20
"""Number of updates over which the speed is averaged."""


class Display:
    """A live display on a terminal; in a log, a line from time to time."""

    def __init__(self, console: Console, live: Live) -> None:
        self.console, self.live = console, live
        self.begun = self.last_logged = time.monotonic()

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def log(self, line: str, *, at_once: bool = False) -> None:
        """Print a permanent line: always if at_once, otherwise only in a log, at most once per interval."""
        if at_once or (not self.console.is_terminal and time.monotonic() - self.last_logged > LOG_SECONDS):
            self.console.print(line, highlight=False)
            self.last_logged = time.monotonic()


class LiveLine(Display):
    """The progress of a run, its status and the remaining time."""

    def __init__(self, console: Console, total: int, done: int) -> None:
        self.total, self.begun_at = total, done
        column = Column(no_wrap=True)
        self.bar = Progress(
            TextColumn("{task.completed:.0f}/{task.total:.0f}", table_column=column),
            TimeRemainingColumn(table_column=column.copy()),
            TextColumn("left", table_column=column.copy()),
            TextColumn("{task.description}", table_column=column.copy()),
            console=console,
            transient=True,
            speed_estimate_period=60,
        )
        self.task = self.bar.add_task("", total=total, completed=done)
        super().__init__(console, self.bar.live)

    def show(self, done: int, status: Sequence[str], message: str | None = None) -> None:
        """Update the line. status: values in order of importance. message: a permanent line."""
        room = self.console.width - len(f"{self.total}/{self.total} 0:00:00 left ")
        self.bar.update(self.task, completed=done, description=fit_into_width(status, room))
        left = (time.monotonic() - self.begun) / max(done - self.begun_at, 1) * max(self.total - done, 0)
        line = "  ".join([*status, *filter(None, [message])])
        self.log(f"{done:>7}  {line}  {left:,.0f} s left", at_once=message is not None)


def fit_into_width(words: Sequence[str], room: int) -> str:
    """As many of the first words as fit into `room` columns."""
    ends = itertools.accumulate(len(word) + 2 for word in words)
    return "  ".join(word for word, end in zip(words, ends, strict=True) if end - 2 <= room)


class Speed:
    """The recent rate per second of a growing count."""

    def __init__(self) -> None:
        self.times: list[tuple[float, int]] = []

    def at(self, count: int) -> float:
        """Record the current count and return the rate."""
        now = time.monotonic()
        self.times = [*self.times[-SPEED_WINDOW:], (now, count)]
        then, before = self.times[0]
        return (count - before) / (now - then) if now > then else 0.0


def format_duration(seconds: float) -> str:
    """Minutes and seconds, as 12:34."""
    seconds = max(seconds, 0)
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def memory_in_use(device: torch.device) -> int:
    """Peak memory use so far, in bytes: of the GPU, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
