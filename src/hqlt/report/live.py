"""What a person sees while a grid runs: each running cell with its loss, speed and time left."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from hqlt.train.grid import Event, Result


class GridDisplay:
    """A live table on a terminal; elsewhere (a log, CI) a line a finished cell.

    >>> with GridDisplay(total=15, budget_steps=...) as display:
    ...     run_grid(cells, folder, workers, display.on_event)
    """

    def __init__(self, cells: int, console: Console | None = None) -> None:
        self.console = console or Console()
        self.cells = cells
        self.done = 0
        self.running: dict[str, Event] = {}
        self.begun = time.monotonic()
        self.fresh = 0.0
        """Share of a cell's work done in this start, summed over cells."""
        self.live = Live(get_renderable=self._render, console=self.console, refresh_per_second=4, transient=True)

    def __enter__(self) -> GridDisplay:
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.console.is_terminal:
            self.live.stop()

    def on_event(self, told: Event | Result) -> None:
        name = told.cell.name
        if isinstance(told, Event):
            self.running[name] = told
            return
        ran_now = self.running.pop(name, None) is not None
        self.done += 1
        self.fresh += ran_now
        score = told.fit.test
        unit = "success" if score.metric == "success" else "accuracy"
        shown = f"{score.value:.3f} bits/byte" if score.metric == "bits" else f"{100 * score.value:.1f} % {unit}"
        self.console.print(
            f"{told.cell.column:>12}  {told.cell.model:<26} {told.cell.seed:>3} {shown:>18}  {told.seconds:5.0f} s"
            f"{'' if ran_now else '  (from an earlier start)'}",
            highlight=False,
        )

    def seconds_left(self) -> float | None:
        now = self.fresh + sum(event.progress.step / event.cell.budget.steps for event in self.running.values())
        left = self.cells - self.done - sum(e.progress.step / e.cell.budget.steps for e in self.running.values())
        return (time.monotonic() - self.begun) / now * left if now > 0 else None

    def _render(self) -> RenderableType:
        table = Table(box=None, padding=(0, 2, 0, 0))
        for column in ("task", "model", "seed", "step", "loss", "gradient", "validation", "speed", "left"):
            table.add_column(column, justify="left" if column in ("task", "model") else "right")
        for cell, told in self.running.values():
            speed = told.tokens / max(told.seconds, 1e-9)
            table.add_row(
                cell.column,
                cell.model,
                str(cell.seed),
                f"{told.step}/{cell.budget.steps}",
                f"{told.loss:.3f}",
                f"{told.gradient_norm:.2f}",
                "" if told.validation is None else f"{told.validation:.3f}",
                f"{speed:,.0f} {cell.unit}/s",
                clock(told.seconds / told.step * (cell.budget.steps - told.step)),
            )
        left = self.seconds_left()
        bar = Progress(
            TextColumn("cells"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("" if left is None else f"about {clock(left)} left"),
        )
        bar.add_task("", total=self.cells, completed=self.done)
        return Group(table, bar)


def clock(seconds: float) -> str:
    seconds = max(seconds, 0)
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
