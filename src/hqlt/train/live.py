"""What a person sees while one run goes: a line that moves."""

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
"""From line to line in a log, where nothing else is to be told."""
SPEED_OVER = 20
"""Times that the shown speed is a mean of."""


class Display:
    """What moves on a terminal while a context lasts, and in a log is a line now and then."""

    def __init__(self, console: Console, live: Live) -> None:
        self.console, self.live = console, live
        self.begun = self.spoke = time.monotonic()

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def log(self, line: str, *, at_once: bool = False) -> None:
        """Print a line that stays: at once, or in a log where none came for a while."""
        if at_once or (not self.console.is_terminal and time.monotonic() - self.spoke > LOG_SECONDS):
            self.console.print(line, highlight=False)
            self.spoke = time.monotonic()


class LiveLine(Display):
    """How far a run is, in words, and the time left."""

    def __init__(self, console: Console, total: int, done: int) -> None:
        self.total, self.begun_at = total, done
        whole = Column(no_wrap=True)
        self.bar = Progress(
            TextColumn("{task.completed:.0f}/{task.total:.0f}", table_column=whole),
            TimeRemainingColumn(table_column=whole.copy()),
            TextColumn("left", table_column=whole.copy()),
            TextColumn("{task.description}", table_column=whole.copy()),
            console=console,
            transient=True,
            speed_estimate_period=60,
        )
        self.task = self.bar.add_task("", total=total, completed=done)
        super().__init__(console, self.bar.live)

    def show(self, done: int, words: Sequence[str], news: str | None = None) -> None:
        """words: of now, the most important first; a narrow terminal shows only those. news: a line that stays."""
        room = self.console.width - len(f"{self.total}/{self.total} 0:00:00 left ")
        self.bar.update(self.task, completed=done, description=fit_into_width(words, room))
        left = (time.monotonic() - self.begun) / max(done - self.begun_at, 1) * max(self.total - done, 0)
        line = "  ".join([*words, *filter(None, [news])])
        self.log(f"{done:>7}  {line}  {left:,.0f} s left", at_once=news is not None)


def fit_into_width(words: Sequence[str], room: int) -> str:
    """The first of the words, whole, that fit side by side into so many columns."""
    ends = itertools.accumulate(len(word) + 2 for word in words)
    return "  ".join(word for word, end in zip(words, ends, strict=True) if end - 2 <= room)


class Speed:
    """Of what is counted up, a second, lately."""

    def __init__(self) -> None:
        self.times: list[tuple[float, int]] = []

    def at(self, count: int) -> float:
        now = time.monotonic()
        self.times = [*self.times[-SPEED_OVER:], (now, count)]
        then, before = self.times[0]
        return (count - before) / (now - then) if now > then else 0.0


def format_duration(seconds: float) -> str:
    seconds = max(seconds, 0)
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def memory_in_use(device: torch.device) -> int:
    """The greatest use so far, in bytes: of the GPU, on a CPU of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
