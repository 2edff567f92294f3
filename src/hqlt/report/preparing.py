"""The live display of `hqlt data prepare`."""

from __future__ import annotations

import time

from rich.console import Console
from rich.live import Live

from hqlt.data import PrepareProgress
from hqlt.train.live import Display, format_duration


class PreparingDisplay(Display):
    """Shows one live line on a terminal; elsewhere (a log, CI), prints a line every half minute."""

    def __init__(self, console: Console) -> None:
        super().__init__(console, Live(console=console, refresh_per_second=4, transient=True))
        self.first: PrepareProgress | None = None
        """The first report of this process."""
        self.kept = 0
        """Number of tokens in finished shards."""

    @property
    def has_started(self) -> bool:
        """Whether there was anything to do."""
        return self.first is not None

    def on_progress(self, progress: PrepareProgress) -> None:
        """Show the progress."""
        self.kept = progress.kept
        if self.first is None:
            self.first = progress
            if progress.tokens:
                self.console.print(f"resuming after {progress.tokens:,} tokens of an earlier run")
            return
        line = self.line_of(progress, self.first, max(time.monotonic() - self.begun, 1e-9))
        self.live.update(line)
        self.log(line)

    @staticmethod
    def line_of(progress: PrepareProgress, first: PrepareProgress, seconds: float) -> str:
        """Format the progress, with speed and remaining time since the first report, `seconds` ago."""
        speed = (progress.tokens - first.tokens) / seconds
        line = f"{progress.documents:,} documents  {progress.tokens:,} tokens  {speed:,.0f} tokens/s"
        if progress.done is not None and first.done is not None and progress.done > first.done:
            left = seconds * (1 - progress.done) / (progress.done - first.done)
            line += f"  {100 * progress.done:.0f} %  about {format_duration(left)} left"
        return line
