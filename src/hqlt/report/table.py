"""Results as one table: a row a model, a column an experiment, for the terminal, for a page and for Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rich.text import Text

from hqlt.report.terminal import FittingTable
from hqlt.train.grid import Result

UNITS = {"accuracy": "accuracy %", "exact": "exact answers %", "bits": "bits/byte", "success": "success %"}
MEANING = {
    "accuracy": "Accuracy: chance 0, perfect 100.",
    "exact": "Exact answers: the share that is right in every byte.",
    "bits": "Bits per byte: lower is better.",
    "success": "Success: the share of episodes, chance not taken off.",
}


TOO_SMALL = "Quick budgets are too small to learn: the scores only show that everything runs."


class TableCell(NamedTuple):
    text: str
    best: bool = False


class Table(NamedTuple):
    columns: list[str]
    rows: list[list[TableCell]]
    caption: str

    def for_terminal(self) -> FittingTable:
        rows = [[Text(cell.text, style="bold" if cell.best else "") for cell in row] for row in self.rows]
        return FittingTable(self.columns, rows, self.caption)

    def as_markdown(self) -> str:
        lines = [self.columns, ["---"] + ["---:"] * (len(self.columns) - 1)]
        lines += [[f"**{cell.text}**" if cell.best else cell.text for cell in row] for row in self.rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{self.caption}\n"


def table_of(
    results: Sequence[Result], paper: Mapping[str, Mapping[str, float]] | None = None, *, quick: bool = False
) -> Table:
    """Test scores by model and experiment; the median over seeds, with all of them behind it where there are several.

    paper: by experiment and model, what the paper reports: a column of its own beside ours. quick: the budgets were
    too small to learn: no score is marked as the best, and the caption says why. Where updates were skipped, because
    their gradient was not finite, a column counts them.
    """
    experiments = list(dict.fromkeys(result.cell.column for result in results))
    models = list(dict.fromkeys(result.cell.model for result in results))
    reported = {label: values for label, values in (paper or {}).items() if values and label in experiments}
    values = {
        (model, label): [
            result.fit.test.value for result in results if (result.cell.model, result.cell.column) == (model, label)
        ]
        for model in models
        for label in experiments
    }
    metric = {result.cell.column: result.fit.test.metric for result in results}
    columns = ["model"]
    for label in experiments:
        columns.append(f"{label}, {UNITS[metric[label]]}")
        columns += ["paper"] * (label in reported)
    skipped = {model: sum(skipped_in(result) for result in results if result.cell.model == model) for model in models}
    columns += ["seconds", *["updates skipped"] * any(skipped.values())]
    rows = []
    for model in models:
        row = [TableCell(model)]
        for label in experiments:
            known = [statistics.median(values[other, label]) for other in models if values[other, label]]
            best = (min if metric[label] == "bits" else max)(known)
            row.append(_score(values[model, label], metric[label], None if quick else best))
            if label in reported:
                theirs = reported[label].get(model)
                row.append(TableCell("–" if theirs is None else f"{theirs:.1f}"))
        own = [result for result in results if result.cell.model == model]
        row.append(TableCell(f"{sum(result.seconds for result in own):.0f}"))
        row += [TableCell(f"{skipped[model]:,}")] * any(skipped.values())
        rows.append(row)
    one_seed = len(results) == len({(result.cell.column, result.cell.model) for result in results})
    seeds = "One seed" if one_seed else "Median over seeds, all of them from worst to best in brackets"
    meanings = " ".join(dict.fromkeys(MEANING[name] for name in metric.values()))
    caption = f"{TOO_SMALL} " * quick + (
        f"Test scores of the checkpoint chosen on validation. {meanings} {seeds}. "
        f"Parameters: {'; '.join(f'{label} {_sizes(results, label)}' for label in experiments)}. "
        f"Seconds: of training, all tasks{'' if one_seed else ' and seeds'}."
    )
    return Table(columns, rows, caption)


def _sizes(results: Sequence[Result], label: str) -> str:
    """The models' sizes on an experiment, from the smallest to the largest."""
    sizes = [f"{size:,}" for size in sorted(result.parameters for result in results if result.cell.column == label)]
    return sizes[0] if sizes[0] == sizes[-1] else f"{sizes[0]} to {sizes[-1]}"


def skipped_in(result: Result) -> int:
    return result.history[-1].skipped if result.history else 0


def _score(values: list[float], metric: str, best: float | None) -> TableCell:
    """best: the best model's, None where none is marked."""
    if not values:
        return TableCell("–")

    def shown(value: float) -> str:
        return f"{value:.3f}" if metric == "bits" else f"{100 * value:.1f}"

    middle = statistics.median(values)
    everyone = sorted(values, reverse=metric == "bits")  # from worst to best
    brackets = f" ({' '.join(map(shown, everyone))})" if len(values) > 1 else ""
    return TableCell(shown(middle) + brackets, best=best is not None and shown(middle) == shown(best))
