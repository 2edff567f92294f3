"""Tables of results, with a row per model and a column per experiment, for terminals, pages and Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rich.text import Text

from hqlt.report.terminal import FittingTable
from hqlt.train.grid import Result

UNITS = {"accuracy": "accuracy %", "exact": "exact answers %", "bits": "bits/byte", "success": "success %"}
MEANING = {
    "accuracy": "Accuracy is normalized: 0 is chance, 100 is perfect.",
    "exact": "Exact answers: share of answers with every byte right.",
    "bits": "Bits per byte: lower is better.",
    "success": "Success: share of successful episodes, not normalized by chance.",
}


TOO_SMALL = "Quick budgets are too small to learn: the scores only show that everything runs."


class TableCell(NamedTuple):
    """A text, possibly marked as the best of its column."""

    text: str
    best: bool = False


class Table(NamedTuple):
    """A table with a caption."""

    columns: list[str]
    rows: list[list[TableCell]]
    caption: str

    def for_terminal(self) -> FittingTable:
        """Convert the table for `rich`."""
        rows = [[Text(cell.text, style="bold" if cell.best else "") for cell in row] for row in self.rows]
        return FittingTable(self.columns, rows, self.caption)

    def as_markdown(self) -> str:
        """Convert the table to Markdown, with the caption below."""
        lines = [self.columns, ["---"] + ["---:"] * (len(self.columns) - 1)]
        lines += [[f"**{cell.text}**" if cell.best else cell.text for cell in row] for row in self.rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{self.caption}\n"


def table_of(
    results: Sequence[Result],
    paper: Mapping[str, Mapping[str, float]] | None = None,
    *,
    quick: bool = False,
    sizes: bool = False,
) -> Table:
    """Make a table of test scores by model and experiment.

    With several seeds, a cell shows the median and, in brackets, all seeds. If any updates were skipped because their
    gradient was not finite, a column counts them.

    Args:
        results: of all cells.
        paper: the paper's results by experiment and model, shown in columns of their own.
        quick: whether the budgets were too small to learn; then no score is marked as the best, and the caption says
            why.
        sizes: whether to show parameters and bytes of state for every score.
    """
    experiments = list(dict.fromkeys(result.cell.column for result in results))
    models = list(dict.fromkeys(result.cell.model for result in results))
    columns: list[tuple[str, Sequence[str | TableCell]]] = [("model", models)]
    for label in experiments:
        by_model = [[r for r in results if (r.cell.model, r.cell.column) == (model, label)] for model in models]
        columns.append(_scores(label, by_model, quick))
        if theirs := (paper or {}).get(label):
            columns.append(("paper", [f"{theirs[model]:.1f}" if model in theirs else "–" for model in models]))
        if sizes:
            first = [model_results[0] if model_results else None for model_results in by_model]
            columns.append(("parameters", [f"{r.parameters:,}" if r else "–" for r in first]))
            columns.append(("state bytes", [f"{r.state_bytes:,}" if r and r.state_bytes else "–" for r in first]))
    own = [[result for result in results if result.cell.model == model] for model in models]
    columns.append(("seconds", [f"{sum(result.seconds for result in model_results):.0f}" for model_results in own]))
    skipped = [sum(map(skipped_updates, model_results)) for model_results in own]
    if any(skipped):
        columns.append(("updates skipped", [f"{count:,}" for count in skipped]))
    rows = zip(*(cells for _, cells in columns), strict=True)
    cells = [[cell if isinstance(cell, TableCell) else TableCell(cell) for cell in row] for row in rows]
    return Table([name for name, _ in columns], cells, caption_of(results, experiments, quick, sizes))


def caption_of(results: Sequence[Result], experiments: Sequence[str], quick: bool, sizes: bool) -> str:
    """Explain scores, seeds and sizes."""
    one_seed = len(results) == len({(result.cell.column, result.cell.model) for result in results})
    seeds = "One seed" if one_seed else "Median over seeds; all seeds in brackets, from worst to best"
    meanings = " ".join(dict.fromkeys(MEANING[result.fit.test.metric] for result in results))
    parameters = "; ".join(f"{label} {_sizes(results, label)}" for label in experiments)
    size = "State bytes: size of the state of one sequence." if sizes else f"Parameters: {parameters}."
    return f"{TOO_SMALL} " * quick + (
        f"Test scores of the checkpoint selected by validation score. {meanings} {seeds}. {size} "
        f"Seconds: training time over all tasks{'' if one_seed else ' and seeds'}."
    )


def _scores(label: str, by_model: Sequence[Sequence[Result]], quick: bool) -> tuple[str, list[TableCell]]:
    """Make an experiment's column; with quick budgets, no score is marked as the best."""
    metric = next(result.fit.test.metric for model_results in by_model for result in model_results)
    values = [[result.fit.test.value for result in model_results] for model_results in by_model]
    best = (min if metric == "bits" else max)(
        statistics.median(model_results) for model_results in values if model_results
    )
    cells = [_score(model_results, metric, None if quick else best) for model_results in values]
    return f"{label}, {UNITS[metric]}", cells


def _sizes(results: Sequence[Result], label: str) -> str:
    """Format the range of the models' numbers of parameters on an experiment."""
    sizes = [f"{size:,}" for size in sorted(result.parameters for result in results if result.cell.column == label)]
    return sizes[0] if sizes[0] == sizes[-1] else f"{sizes[0]} to {sizes[-1]}"


def skipped_updates(result: Result) -> int:
    """Return the number of updates skipped during training."""
    return result.history[-1].skipped if result.history else 0


def _score(values: list[float], metric: str, best: float | None) -> TableCell:
    """Format a model's scores; they are marked if their median is the best one (None: no marks)."""
    if not values:
        return TableCell("–")

    def shown(value: float) -> str:
        return f"{value:.3f}" if metric == "bits" else f"{100 * value:.1f}"

    middle = statistics.median(values)
    seeds = sorted(values, reverse=metric == "bits")  # from worst to best
    brackets = f" ({' '.join(map(shown, seeds))})" if len(values) > 1 else ""
    return TableCell(shown(middle) + brackets, best=best is not None and shown(middle) == shown(best))
