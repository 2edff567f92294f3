"""Plots of results. Every model keeps its colour, and every seed is drawn."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hqlt.task import TASKS
from hqlt.train.grid import Result

COLOURS = {
    "Transformer": "#7a7a7a",
    "DeltaNet": "#d98e04",
    "Delayed-Streaming": "#2a9d8f",
    "Delayed-Chunk": "#7b5ea7",
    "Synchronous": "#c0392b",
}
TITLES = {
    "parity": "State tracking: parity",
    "recall": "Recall: key–value pairs",
    "text": "Real text: Python's library",
}
METRICS = {"accuracy": "accuracy (chance = 0)", "bits": "bits per byte"}


def figure_of(results: Sequence[Result]) -> Figure:
    """Two rows of panels, a column a task: the test score along the task's coordinate, and the learning curves."""
    tasks = list(dict.fromkeys(result.cell.task for result in results))
    figure, panels = pyplot.subplots(
        2, len(tasks), figsize=(4.6 * len(tasks), 6.6), squeeze=False, layout="constrained"
    )
    for (top, bottom), task in zip(panels.T, tasks, strict=True):
        of_task = [result for result in results if result.cell.task == task]
        for result in of_task:
            draw_curve(top, result)
            draw_learning(bottom, result)
        label_panels(top, bottom, of_task[0])
    handles, labels = panels[0, 0].get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    figure.legend(once.values(), once.keys(), loc="outside lower center", ncols=len(once), frameon=False)
    return figure


def draw_curve(axes: Axes, result: Result) -> None:
    x, y = zip(*result.fit.test.curve, strict=True)
    axes.plot(x, y, marker="o", markersize=3, color=COLOURS.get(result.cell.model), label=result.cell.model)


def draw_learning(axes: Axes, result: Result) -> None:
    taken = [(told.step, told.validation) for told in result.history if told.validation is not None]
    x, y = zip(*taken, strict=True)
    axes.plot(x, y, color=COLOURS.get(result.cell.model), label=result.cell.model)


def label_panels(top: Axes, bottom: Axes, result: Result) -> None:
    task = TASKS[result.cell.task](**result.cell.task_options)
    top.set_title(TITLES.get(task.name, task.name))
    top.set_xlabel(f"{task.coordinate_name} (test)")
    bottom.set_xlabel("updates (validation)")
    for axes in (top, bottom):
        axes.set_ylabel(METRICS[task.metric])
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        if task.metric == "accuracy":
            axes.set_ylim(-0.1, 1.05)


def save(figure: Figure, path: Path) -> str:
    """Write a PNG, and return it as a data URL for a page that needs no other file."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    pyplot.close(figure)
    path.write_bytes(picture.getvalue())
    return "data:image/png;base64," + base64.b64encode(picture.getvalue()).decode()
