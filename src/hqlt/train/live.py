"""What a person sees while one run goes: a line that moves."""

from __future__ import annotations

import itertools
import resource
import sys
import time
from collections.abc import Sequence
from types import TracebackType

import torch
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

LOG_SECONDS = 30
"""From line to line in a log, where nothing else is to be told."""
SPEED_OVER = 20
"""Times that the shown speed is a mean of."""


class LiveLine:
    """How far a run is, in words, and the time left: a line that moves on a terminal, or one now and then in a log."""

    def __init__(self, console: Console, total: int, done: int) -> None:
        self.console, self.total, self.begun_at = console, total, done
        self.bar = Progress(
            TextColumn("{task.completed:.0f}/{task.total:.0f}", table_column=Column(no_wrap=True)),
            TimeRemainingColumn(table_column=Column(no_wrap=True)),
            TextColumn("left", table_column=Column(no_wrap=True)),
            TextColumn("{task.description}", table_column=Column(no_wrap=True)),
            console=console,
            transient=True,
            disable=not console.is_terminal,
            speed_estimate_period=60,
        )
        self.task = self.bar.add_task("", total=total, completed=done)
        self.begun = self.spoke = time.monotonic()

    def __enter__(self) -> LiveLine:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def show(self, done: int, words: Sequence[str], news: str | None = None) -> None:
        """words: of now, the most important first; a narrow terminal shows only those. news: a line that stays."""
        now = time.monotonic()
        room = self.console.width - len(f"{self.total}/{self.total} 0:00:00 left ")
        self.bar.update(self.task, completed=done, description=as_many_as_fit(words, room))
        late = now - self.spoke > LOG_SECONDS and not self.console.is_terminal
        if news or late:
            left = (now - self.begun) / max(done - self.begun_at, 1) * max(self.total - done, 0)
            line = "  ".join([*words, *filter(None, [news])])
            self.console.print(f"{done:>7}  {line}  {left:,.0f} s left", highlight=False)
            self.spoke = now


def as_many_as_fit(words: Sequence[str], room: int) -> str:
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


def memory_in_use(device: torch.device) -> int:
    """The greatest use so far, in bytes: of the GPU, on a CPU of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
