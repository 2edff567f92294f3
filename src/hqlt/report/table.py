"""Results as one table: a row a model, a column a task, for the terminal, for a page and for Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple

import rich.table

from hqlt.train.grid import Result


class TableCell(NamedTuple):
    text: str
    best: bool = False


class Table(NamedTuple):
    columns: list[str]
    rows: list[list[TableCell]]
    caption: str

    def for_terminal(self) -> rich.table.Table:
        table = rich.table.Table(caption=self.caption)
        for i, name in enumerate(self.columns):
            table.add_column(name, justify="left" if i == 0 else "right", no_wrap=i == 0)
        for row in self.rows:
            table.add_row(*(f"[bold]{cell.text}[/bold]" if cell.best else cell.text for cell in row))
        return table

    def as_markdown(self) -> str:
        lines = [self.columns, ["---"] + ["---:"] * (len(self.columns) - 1)]
        lines += [[f"**{cell.text}**" if cell.best else cell.text for cell in row] for row in self.rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{self.caption}\n"


def table_of(results: Sequence[Result]) -> Table:
    """Test scores by model and task; the median over seeds, with all of them behind it where there are several."""
    tasks = list(dict.fromkeys(result.cell.task for result in results))
    models = list(dict.fromkeys(result.cell.model for result in results))
    values = {
        (model, task): [
            result.fit.test.value for result in results if (result.cell.model, result.cell.task) == (model, task)
        ]
        for model in models
        for task in tasks
    }
    metric = {result.cell.task: result.fit.test.metric for result in results}
    columns = ["model"]
    for task in tasks:
        columns.append(f"{task}, {'bits/byte' if metric[task] == 'bits' else 'accuracy %'}")
    columns.append("seconds")
    rows = []
    for model in models:
        row = [TableCell(model)]
        for task in tasks:
            known = [statistics.median(values[other, task]) for other in models if values[other, task]]
            best = (min if metric[task] == "bits" else max)(known)
            row.append(_score(values[model, task], metric[task], best))
        own = [result for result in results if result.cell.model == model]
        row.append(TableCell(f"{sum(result.seconds for result in own):.0f}"))
        rows.append(row)
    seeds = len({result.cell.seed for result in results})
    caption = (
        "Test scores of the checkpoint chosen on validation. Accuracy: chance 0, perfect 100. Bits per byte: lower is "
        f"better. {'One seed' if seeds == 1 else f'Median of {seeds} seeds, all in brackets'}. "
        f"Parameters: {'; '.join(f'{task} {_sizes(results, task)}' for task in tasks)}. "
        "Seconds: of training, all tasks."
    )
    return Table(columns, rows, caption)


def _sizes(results: Sequence[Result], task: str) -> str:
    """The models' sizes on a task, from the smallest to the largest."""
    sizes = [f"{size:,}" for size in sorted(result.parameters for result in results if result.cell.task == task)]
    return sizes[0] if sizes[0] == sizes[-1] else f"{sizes[0]} to {sizes[-1]}"


def _score(values: list[float], metric: str, best: float) -> TableCell:
    if not values:
        return TableCell("–")

    def shown(value: float) -> str:
        return f"{value:.3f}" if metric == "bits" else f"{100 * value:.1f}"

    middle = statistics.median(values)
    everyone = f" ({' '.join(map(shown, sorted(values)))})" if len(values) > 1 else ""
    return TableCell(shown(middle) + everyone, best=shown(middle) == shown(best))
