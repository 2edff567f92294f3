"""What a person sees while documents become tokens."""

from __future__ import annotations

import time

from rich.console import Console
from rich.live import Live

from hqlt.data import PrepareProgress
from hqlt.train.live import Display, format_duration


class PreparingDisplay(Display):
    """One live line on a terminal; elsewhere (a log, CI) a line every half minute."""

    def __init__(self, console: Console) -> None:
        super().__init__(console, Live(console=console, refresh_per_second=4, transient=True))
        self.first: PrepareProgress | None = None
        """Where this start began."""
        self.kept = 0

    @property
    def worked(self) -> bool:
        """Whether there was anything to do."""
        return self.first is not None

    def on_progress(self, told: PrepareProgress) -> None:
        self.kept = told.kept
        if self.first is None:
            self.first = told
            if told.tokens:
                self.console.print(f"going on after {told.tokens:,} tokens of an earlier start")
            return
        line = self.line_of(told, self.first, max(time.monotonic() - self.begun, 1e-9))
        self.live.update(line)
        self.log(line)

    @staticmethod
    def line_of(told: PrepareProgress, first: PrepareProgress, seconds: float) -> str:
        speed = (told.tokens - first.tokens) / seconds
        line = f"{told.documents:,} documents  {told.tokens:,} tokens  {speed:,.0f} tokens/s"
        if told.done is not None and first.done is not None and told.done > first.done:
            left = seconds * (1 - told.done) / (told.done - first.done)
            line += f"  {100 * told.done:.0f} %  about {format_duration(left)} left"
        return line
