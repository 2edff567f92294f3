"""The live display of a grid: every running cell with its loss, speed and remaining time."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from hqlt.train.grid import Cell, Event, Result
from hqlt.train.live import Display, format_duration

COLUMNS = ("task", "model", "seed", "step", "loss", "gradient", "validation", "skipped", "speed", "left")
NAMES = ("task", "model")
GAP = 2
OPTIONAL = ("gradient", "seed", "skipped", "speed", "validation", "left", "loss", "task")
"""Columns that are dropped on a narrow terminal, in this order."""


class GridDisplay(Display):
    """Shows a live table on a terminal; elsewhere (a log, CI), prints a line for each finished cell.

        with GridDisplay(cells) as display:
            run_grid(cells, folder, workers, display.on_event)

    Args:
        cells: all cells of the grid.
        console: where to print. Default: stdout.
    """

    def __init__(self, cells: Sequence[Cell], console: Console | None = None) -> None:
        self.console = console or Console()
        self.cells = len(cells)
        columns = zip(*map(names_of, cells), strict=True)
        self.widths = [max((len(name) for name in names), default=0) for names in columns]
        self.done = 0
        self.running: Mapping[str, Event] = {}
        """Replaced at each event and never modified, because the drawing thread may read it at any time."""
        self.trained = 0
        """Number of cells that were trained by this process rather than by an earlier run."""
        live = Live(get_renderable=self._render, console=self.console, refresh_per_second=4, transient=True)
        super().__init__(self.console, live)

    def on_event(self, event: Event | Result) -> None:
        name = event.cell.name
        if isinstance(event, Event):
            before = self.running.get(name)
            if before is not None and event.progress.validation is None:  # keep showing the latest score
                event = event._replace(progress=event.progress._replace(validation=before.progress.validation))
            self.running = {**self.running, name: event}
            return
        ran_now = name in self.running
        self.running = {other: running for other, running in self.running.items() if other != name}
        self.done += 1
        self.trained += ran_now
        self.console.print(self.line_of(event, ran_now), soft_wrap=not self.console.is_terminal)

    def line_of(self, result: Result, ran_now: bool) -> Text:
        """Format a finished cell, with names in columns if there is room."""
        score = score_text(result.fit.test.metric, result.fit.test.value)
        rest = [score, f"{result.seconds:.0f} s", *([] if ran_now else ["from an earlier run"])]
        names = names_of(result.cell)
        padded = [name.ljust(width) for name, width in zip(names, self.widths, strict=True)]
        whole = "  ".join([*padded, score.rjust(18), *rest[1:]])
        narrow = self.console.is_terminal and len(whole) > self.console.width
        return Text("  ".join([*names, *rest]) if narrow else whole)

    def seconds_left(self, running: Mapping[str, Event]) -> float | None:
        """Estimate the remaining time; None before the first update."""
        in_progress = sum(event.progress.step / event.cell.budget.steps for event in running.values())
        trained = self.trained + in_progress
        left = self.cells - self.done - in_progress
        return (time.monotonic() - self.begun) / trained * left if trained > 0 else None

    def _render(self) -> RenderableType:
        """Called in a thread of its own."""
        running = self.running
        left = self.seconds_left(running)
        bar = Progress(
            TextColumn("cells"),
            BarColumn(bar_width=max(min(self.console.width - 36, 40), 4)),
            MofNCompleteColumn(),
            TextColumn("" if left is None else f"about {format_duration(left)} left"),
        )
        bar.add_task("", total=self.cells, completed=self.done)
        return Group(self._table([row_of(event) for event in running.values()]), bar)

    def _table(self, rows: Sequence[Mapping[str, str]]) -> Table:
        """Make a table of as many columns as fit into the terminal."""
        widths = {name: max(map(cell_len, (name, *(row[name] for row in rows)))) + GAP for name in COLUMNS}
        if not any(row["skipped"] for row in rows):
            del widths["skipped"]
        for name in OPTIONAL:
            if sum(widths.values()) > self.console.width:
                widths.pop(name, None)
        table = Table(box=None, padding=(0, GAP, 0, 0))
        for name in widths:
            table.add_column(name, justify="left" if name in NAMES else "right", no_wrap=True)
        for row in rows:
            table.add_row(*(Text(row[name]) for name in widths))
        return table


def names_of(cell: Cell) -> tuple[str, str, str]:
    """Return experiment, model and seed of a cell."""
    return cell.column, cell.model, str(cell.seed)


def row_of(event: Event) -> dict[str, str]:
    """Format a running cell, by column."""
    cell, progress = event.cell, event.progress
    speed = progress.tokens / max(progress.seconds, 1e-9)
    return {
        **dict(zip(("task", "model", "seed"), names_of(cell), strict=True)),
        "step": f"{progress.step}/{cell.budget.steps}",
        "loss": f"{progress.loss:.3f} {cell.loss_unit}".rstrip(),
        "gradient": f"{progress.gradient_norm:.2f}",
        "validation": "" if progress.validation is None else score_text(cell.metric, progress.validation),
        "skipped": f"{progress.skipped}" if progress.skipped else "",
        "speed": f"{speed:,.0f} {cell.unit}/s",
        "left": format_duration(progress.seconds / progress.step * (cell.budget.steps - progress.step)),
    }


def score_text(metric: str, value: float) -> str:
    """Format a score with its unit."""
    if metric == "bits":
        return f"{value:.3f} bits/byte"
    return f"{100 * value:.1f} % {'exact' if metric == 'exact' else 'success' if metric == 'success' else 'accuracy'}"
