"""What a person sees while one run goes: a line that moves."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Sequence
from types import TracebackType

import torch
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeRemainingColumn

LOG_SECONDS = 30
"""From line to line in a log, where nothing else is to be told."""
SPEED_OVER = 20
"""Times that the shown speed is a mean of."""


class LiveLine:
    """How far a run is, in words, and the time left: a line that moves on a terminal, or one now and then in a log."""

    def __init__(self, console: Console, total: int, done: int) -> None:
        self.console, self.total, self.begun_at = console, total, done
        self.bar = Progress(
            TextColumn("{task.completed:.0f}/{task.total:.0f}  {task.description}"),
            TimeRemainingColumn(),
            TextColumn("left"),
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
        """words: of now. news: what is worth a line that stays."""
        now = time.monotonic()
        self.bar.update(self.task, completed=done, description="  ".join(words))
        late = now - self.spoke > LOG_SECONDS and not self.console.is_terminal
        if news or late:
            left = (now - self.begun) / max(done - self.begun_at, 1) * max(self.total - done, 0)
            line = "  ".join([*words, *filter(None, [news])])
            self.console.print(f"{done:>7}  {line}  {left:,.0f} s left", highlight=False)
            self.spoke = now


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
