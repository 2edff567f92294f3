"""Plots of results. Every model keeps its colour, and every seed is drawn."""

from __future__ import annotations

import base64
import io
import itertools
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from hqlt.train.grid import Result

Curve: TypeAlias = Sequence[tuple[float, float]]

COLOURS = {
    "Transformer": "#7a7a7a",
    "DeltaNet": "#d98e04",
    "DeltaNet, β ≤ 2": "#d98e04",
    "Delayed-Streaming": "#2a9d8f",
    "Delayed-Chunk": "#7b5ea7",
    "Synchronous": "#c0392b",
    "LSTM": "#00441b",
}
OTHERS = (
    "#1f77b4", "#8c564b", "#e377c2", "#17becf", "#9acd32", "#000080", "#ff7f0e", "#2e8b57", "#ff0000", "#b8860b",
    "#9400d3", "#000000", "#87ceeb", "#fa8072", "#006400", "#cd5c5c",
)  # fmt: skip
"""Colours of models that have none of their own, in the order in which they come."""
TITLES = {
    "parity": "State tracking: parity",
    "recall": "Recall: key–value pairs",
    "text": "Real text: Python's library",
}
METRICS = {
    "accuracy": "accuracy (chance = 0)",
    "exact": "answers exactly right",
    "bits": "bits per byte",
    "success": "success",
}
WIDTH = 4.6
"""Of a panel, in inches."""
COLUMNS = 4
"""Experiments side by side."""


def figure_of(results: Sequence[Result]) -> Figure:
    """Two panels an experiment, one above the other: the test score along the task's coordinate, and learning curves.

    Where there are several seeds, each is a thin line and their median a thick one.
    """
    experiments = list(dict.fromkeys(result.cell.column for result in results))
    models = list(dict.fromkeys(result.cell.model for result in results))
    colours = dict(zip([model for model in models if model not in COLOURS], itertools.cycle(OTHERS), strict=False))
    columns, rows = min(len(experiments), COLUMNS), math.ceil(len(experiments) / COLUMNS)
    beside = max(int(WIDTH * columns / (0.08 * max(map(len, models)) + 0.6)), 1)  # inches of text, of line and gap
    height = 6.2 * rows + 0.22 * math.ceil(len(models) / beside)
    figure, panels = pyplot.subplots(
        2 * rows, columns, figsize=(WIDTH * columns, height), squeeze=False, layout="constrained"
    )
    for axes in panels.flat:
        axes.set_axis_off()
    for i, label in enumerate(experiments):
        top, bottom = (panels[2 * (i // columns) + below, i % columns] for below in (0, 1))
        of_experiment = [result for result in results if result.cell.column == label]
        for model in models:
            own = [result for result in of_experiment if result.cell.model == model]
            style = {"color": (COLOURS | colours)[model], "label": model}
            if of_experiment[0].cell.coordinate_name is not None:
                draw(top, [result.fit.test.curve for result in own], marker="o", markersize=3, **style)
            draw(bottom, [learning_curve(result) for result in own], **style)
        label_panels(top, bottom, of_experiment[0])
    drawn = [axes.get_legend_handles_labels() for axes in panels.flat]
    once = {label: handle for handles, labels in drawn for handle, label in zip(handles, labels, strict=True)}
    figure.legend(once.values(), once.keys(), loc="outside lower center", ncols=beside, frameon=False)
    return figure


def draw(axes: Axes, curves: Sequence[Curve], **style: Any) -> None:
    """One curve as it is; several thin, and their median, point by point."""
    if len(curves) > 1:
        for curve in curves:
            axes.plot(*zip(*curve, strict=True), color=style["color"], linewidth=0.6, alpha=0.4)
    if curves:
        x = [x for x, _ in curves[0]]
        y = [statistics.median(values) for values in zip(*([y for _, y in curve] for curve in curves), strict=True)]
        axes.plot(x, y, **style)


def learning_curve(result: Result) -> Curve:
    return [(told.step, told.validation) for told in result.history if told.validation is not None]


def label_panels(top: Axes, bottom: Axes, result: Result) -> None:
    metric, coordinate = result.fit.test.metric, result.cell.coordinate_name
    counted = "steps of the world (greedy episodes)" if metric == "success" else "updates (validation)"
    shown = [bottom] if coordinate is None else [top, bottom]
    shown[0].set_title(TITLES.get(result.cell.column, result.cell.column))
    top.set_xlabel(f"{coordinate} (test)")
    bottom.set_xlabel(counted)
    for axes in shown:
        axes.set_axis_on()
        axes.set_ylabel(METRICS[metric])
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        if metric != "bits":
            axes.set_ylim(-0.1, 1.05)


def save(figure: Figure, path: Path) -> str:
    """Write a PNG of 256 colours, and return it as a data URL for a page that needs no other file."""
    drawn, picture = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=110)
    pyplot.close(figure)
    with Image.open(drawn) as image:  # a third of the bytes, and the same to the eye
        image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(picture, format="png", optimize=True)
    path.write_bytes(picture.getvalue())
    return "data:image/png;base64," + base64.b64encode(picture.getvalue()).decode()
