"""Plots of results. Every model keeps its colour, and every seed is drawn."""

from __future__ import annotations

import base64
import io
import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter
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
    "#1f77b4", "#e377c2", "#8c564b", "#9acd32", "#17becf", "#000080", "#000000", "#ff7f0e", "#ff00ff",
)  # fmt: skip
"""Colours of models that have none of their own, in the order in which they come."""
MARKERS = "os^DvPX*h"
MANY = 9
"""Models of a panel, at most: more cannot be told apart."""
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
WIDTH, HEIGHT = 4.6, 3.1
"""Of a panel, in inches."""
DASH = 5
"""Length of a dash where curves coincide, in widths of the line."""
COLUMNS = 4
"""Experiments side by side."""


def figure_of(results: Sequence[Result]) -> Figure:
    """Two panels an experiment, one above the other: the test score along the task's coordinate, and learning curves.

    Where there are several seeds, each is a thin line and their median a thick one. Where curves coincide, each is seen
    in turn. More models than MANY take several columns, side by side.
    """
    groups = grouped(list(dict.fromkeys(result.cell.model for result in results)))
    columns = [
        (of_column, group)
        for label in dict.fromkeys(result.cell.column for result in results)
        for group in groups
        if (of_column := [r for r in results if r.cell.column == label and r.cell.model in group])
    ]
    beside = min(len(columns), COLUMNS // len(groups) * len(groups) or COLUMNS)
    mosaic: list[Any] = []
    for i in range(0, len(columns), beside):
        row = range(i, min(i + beside, len(columns)))
        blank = ["."] * (beside - len(row))
        tested = [has_coordinate(columns[j][0]) for j in row]
        if any(tested):
            mosaic.append([f"test {j}" if has else f"learning {j}" for j, has in zip(row, tested, strict=True)] + blank)
        mosaic.append([f"learning {j}" for j in row] + blank)
    width, together = WIDTH * beside, len(groups) == 1
    fit = entries_beside(groups[0], width)
    in_legends = (
        math.ceil(len(groups[0]) / fit) if together else max(map(len, groups)) * math.ceil(len(columns) / beside)
    )
    figure = pyplot.figure(figsize=(width, HEIGHT * len(mosaic) + 0.22 * in_legends), layout="constrained")
    panels = figure.subplot_mosaic(mosaic)
    for j, (of_column, group) in enumerate(columns):
        own = [panels[name] for name in (f"test {j}", f"learning {j}") if name in panels]
        draw_experiment(own, of_column, styles_of(group))
        if not together:
            if len(family := {model.partition(",")[0] for model in group}) == 1:
                own[0].set_title(f"{own[0].get_title()}, {family.pop()}")
            own[-1].legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), frameon=False)
    if together:
        handles = [Line2D([], [], markersize=4, **style) for style in styles_of(groups[0]).values()]
        figure.legend(handles=handles, loc="outside lower center", ncols=fit, frameon=False)
    return figure


def grouped(models: Sequence[str]) -> list[list[str]]:
    """At most MANY together, those of one family (what stands before a comma) beside each other."""
    families: dict[str, list[str]] = {}
    for model in models:
        families.setdefault(model.partition(",")[0], []).append(model)
    groups: list[list[str]] = [[]]
    for family in families.values() if len(models) > MANY else [list(models)]:
        for part in (family[i : i + MANY] for i in range(0, len(family), MANY)):
            if len(groups[-1]) + len(part) > MANY:
                groups.append([])
            groups[-1] += part
    return groups


def styles_of(models: Sequence[str]) -> dict[str, dict[str, Any]]:
    """A colour and a marker for each."""
    others = itertools.cycle(OTHERS)
    return {
        model: {"color": COLOURS.get(model) or next(others), "marker": marker, "label": model}
        for model, marker in zip(models, itertools.cycle(MARKERS), strict=False)
    }


def entries_beside(models: Sequence[str], width: float) -> int:
    """How many entries of a legend fit into a line of so many inches."""
    return max(int(width / (0.08 * max(map(len, models)) + 0.6)), 1)  # of text, of line and gap


def has_coordinate(results: Sequence[Result]) -> bool:
    return results[0].cell.coordinate_name is not None


def draw_experiment(panels: Sequence[Axes], results: Sequence[Result], styles: Mapping[str, dict[str, Any]]) -> None:
    """panels: the test score's, where there is a coordinate, and the learning curves'."""
    first = results[0]
    metric = first.fit.test.metric
    curves: list[tuple[Callable[[Result], Curve], str]] = [
        (learning_curve, "steps of the world (greedy episodes)" if metric == "success" else "updates (validation)")
    ]
    if has_coordinate(results):
        curves.insert(0, (test_curve, f"{first.cell.coordinate_name} (test)"))
    panels[0].set_title(TITLES.get(first.cell.column, first.cell.column))
    for axes, (curve_of, name) in zip(panels, curves, strict=True):
        drawn = {model: [curve_of(result) for result in results if result.cell.model == model] for model in styles}
        draw(axes, {model: of_model for model, of_model in drawn.items() if of_model}, styles)
        axes.set_xlabel(name)
        axes.set_ylabel(METRICS[metric])
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        if metric != "bits":
            axes.set_ylim(min(-0.05, axes.dataLim.y0 - 0.05), 1.05)


def draw(axes: Axes, curves: Mapping[str, Sequence[Curve]], styles: Mapping[str, dict[str, Any]]) -> None:
    """By model: one curve as it is; several thin, and their median, point by point."""
    medians = {model: median_of(of_model) for model, of_model in curves.items()}
    for model, of_model in curves.items():
        style = styles[model]
        if len(of_model) > 1:
            for curve in of_model:
                axes.plot(*zip(*curve, strict=True), color=style["color"], linewidth=0.6, alpha=0.4)
        alike = [other for other, curve in medians.items() if coincide(curve, medians[model])]
        turn, turns = alike.index(model), len(alike)
        dashes = "-" if turns == 1 else (turn * DASH, (DASH, (turns - 1) * DASH))
        every = (turn % len(medians[model]), turns)
        axes.plot(*zip(*medians[model], strict=True), markersize=4, markevery=every, **{"linestyle": dashes} | style)


def median_of(curves: Sequence[Curve]) -> Curve:
    y = [statistics.median(values) for values in zip(*([y for _, y in curve] for curve in curves), strict=True)]
    return [(x, middle) for (x, _), middle in zip(curves[0], y, strict=True)]


def coincide(one: Curve, other: Curve) -> bool:
    """To the eye: one hides the other."""
    if [x for x, _ in one] != [x for x, _ in other]:
        return False
    return max(abs(a - b) for (_, a), (_, b) in zip(one, other, strict=True)) < 0.01


def test_curve(result: Result) -> Curve:
    return result.fit.test.curve


def learning_curve(result: Result) -> Curve:
    return [(told.step, told.validation) for told in result.history if told.validation is not None]


def save(figure: Figure, path: Path) -> str:
    """Write a PNG of 256 colours, and return it as a data URL for a page that needs no other file."""
    drawn, picture = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=110)
    pyplot.close(figure)
    with Image.open(drawn) as image:  # a third of the bytes, and the same to the eye
        image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(picture, format="png", optimize=True)
    path.write_bytes(picture.getvalue())
    return "data:image/png;base64," + base64.b64encode(picture.getvalue()).decode()
