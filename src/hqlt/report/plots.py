"""Plots of results. Every model has a fixed color, and every seed is drawn."""

from __future__ import annotations

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
from matplotlib.ticker import FuncFormatter, PercentFormatter
from PIL import Image

from hqlt.report.palette import GREY, PALETTE
from hqlt.report.palette import MODELS as MODEL_COLORS
from hqlt.report.vector import plot_of
from hqlt.train.grid import Result

Curve: TypeAlias = Sequence[tuple[float, float]]

MARKERS = "os^DvPX*h"
DASHES = ("-", "--", ":")
MAX_MODELS = 9
"""Maximum number of models in a panel; more could not be distinguished."""
TITLES = {
    "parity": "State tracking: parity",
    "recall": "Recall: key–value pairs",
    "text": "Real text: Python's library",
}
METRICS = {
    "accuracy": "accuracy above chance, %",
    "exact": "answers exactly right, %",
    "bits": "bits per byte",
    "success": "success, %",
}
WIDTH, HEIGHT = 4.6, 3.1
"""Size of a panel, in inches."""
LINE, NESTED, WIDEST = 1.5, 2.4, 10.0
"""Width of a line; added width for each line that hides it, so that it is visible around them; maximum width."""
CLOSE = 0.01
"""Curves that differ by less than this hide each other."""
THOUSANDS = 10_000
"""Axes that reach this value are labeled in thousands."""
COLUMNS = 4
"""Maximum number of panels in a row."""


def figure_of(results: Sequence[Result]) -> Figure:
    """Plot two panels per experiment: the test score along the task's coordinate, and below it the learning curves.

    With several seeds, each is a thin line and their median a thick one. More than MAX_MODELS models are distributed
    over several columns.
    """
    groups = group_models(list(dict.fromkeys(result.cell.model for result in results)))
    columns = [
        (column_results, group)
        for label in dict.fromkeys(result.cell.column for result in results)
        for group in groups
        if (column_results := [r for r in results if r.cell.column == label and r.cell.model in group])
    ]
    per_row = min(len(columns), COLUMNS // len(groups) * len(groups) or COLUMNS)
    mosaic: list[Any] = []
    for i in range(0, len(columns), per_row):
        row = range(i, min(i + per_row, len(columns)))
        blank = ["."] * (per_row - len(row))
        tested = [has_coordinate(columns[j][0]) for j in row]
        if any(tested):
            mosaic.append([f"test {j}" if has else f"learning {j}" for j, has in zip(row, tested, strict=True)] + blank)
        mosaic.append([f"learning {j}" for j in row] + blank)
    width, shared_legend = WIDTH * per_row, len(groups) == 1
    fit = entries_per_line(groups[0], width)
    legend_lines = (
        math.ceil(len(groups[0]) / fit) if shared_legend else max(map(len, groups)) * math.ceil(len(columns) / per_row)
    )
    figure = pyplot.figure(figsize=(width, HEIGHT * len(mosaic) + 0.22 * legend_lines), layout="constrained")
    panels = figure.subplot_mosaic(mosaic)
    for j, (column_results, group) in enumerate(columns):
        own = [panels[name] for name in (f"test {j}", f"learning {j}") if name in panels]
        for axes in own:
            axes.set_gid(f"column {j}")
        draw_experiment(own, column_results, styles_of(group))
        if not shared_legend:
            if len(family := {model.partition(",")[0] for model in group}) == 1:
                own[0].set_title(f"{own[0].get_title()}, {family.pop()}")
            own[-1].legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), frameon=False)
    if shared_legend:
        handles = [Line2D([], [], markersize=5, **style) for style in styles_of(groups[0]).values()]
        figure.legend(handles=handles, loc="outside lower center", ncols=fit, frameon=False)
    return figure


def group_models(models: Sequence[str]) -> list[list[str]]:
    """Group models into groups of at most MAX_MODELS, with models of one family next to each other.

    A model's family is the part of its label before the first comma.
    """
    families: dict[str, list[str]] = {}
    for model in models:
        families.setdefault(model.partition(",")[0], []).append(model)
    groups: list[list[str]] = [[]]
    for family in families.values() if len(models) > MAX_MODELS else [list(models)]:
        for part in (family[i : i + MAX_MODELS] for i in range(0, len(family), MAX_MODELS)):
            if len(groups[-1]) + len(part) > MAX_MODELS:
                groups.append([])
            groups[-1] += part
    return groups


def styles_of(models: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Assign each model a marker, a color and a dash style, as arguments of `Axes.plot`.

    Models have the colors of `palette.MODELS`; the first model of a family without one takes the family's color. The
    others take the remaining colors of the palette, first with solid and then with dashed lines.
    """
    colors = {model: MODEL_COLORS[model] for model in models if model in MODEL_COLORS}
    for model in models:
        family = MODEL_COLORS.get(model.partition(",")[0])
        if model not in colors and family is not None and family not in colors.values():
            colors[model] = family
    left = itertools.cycle((color, dash) for dash in DASHES for color in PALETTE if color not in colors.values())
    styles = {}
    for model, marker in zip(models, itertools.cycle(MARKERS), strict=False):
        color, dash = (colors[model], "-") if model in colors else next(left)
        styles[model] = {"color": color, "linestyle": dash, "marker": marker, "label": model}
    return styles


def entries_per_line(models: Sequence[str], width: float) -> int:
    """Estimate how many entries of a legend fit into a line of `width` inches."""
    return max(int(width / (0.08 * max(map(len, models)) + 0.6)), 1)  # text; line and gap


def has_coordinate(results: Sequence[Result]) -> bool:
    """Whether the experiment's test score has a coordinate."""
    return results[0].cell.coordinate_name is not None


def draw_experiment(panels: Sequence[Axes], results: Sequence[Result], styles: Mapping[str, dict[str, Any]]) -> None:
    """Draw an experiment: the test score in the first of two panels (if it has a coordinate), then learning curves."""
    first = results[0]
    metric = first.fit.test.metric
    curves: list[tuple[Callable[[Result], Curve], str]] = [
        (learning_curve, "environment steps (greedy evaluation)" if metric == "success" else "updates (validation)")
    ]
    if has_coordinate(results):
        curves.insert(0, (test_curve, f"{first.cell.coordinate_name} (test)"))
    panels[0].set_title(TITLES.get(first.cell.column, first.cell.column))
    for axes, (curve_of, name) in zip(panels, curves, strict=True):
        drawn = {model: [curve_of(result) for result in results if result.cell.model == model] for model in styles}
        draw(axes, {model: model_curves for model, model_curves in drawn.items() if model_curves}, styles)
        axes.set_xlabel(name)
        axes.set_ylabel(METRICS[metric])
        axes.xaxis.set_major_formatter(in_thousands(axes))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        if metric != "bits":
            axes.set_ylim(min(-0.05, axes.dataLim.y0 - 0.05), 1.06)
            axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=""))
        if metric == "accuracy":
            axes.axhline(0, color=GREY, linewidth=1, linestyle=(0, (1, 1.5)), zorder=1)
            coordinates = ("axes fraction", "data")
            axes.annotate("chance", xy=(1.01, 0), xycoords=coordinates, va="center", fontsize=8, color=GREY)


def in_thousands(axes: Axes) -> FuncFormatter:
    """Format all tick labels of an x-axis alike: in thousands if the axis is long."""

    def text(x: float, _: object = None) -> str:
        return f"{x / 1000:,g}k" if x and axes.get_xlim()[1] >= THOUSANDS else f"{x:,g}"

    return FuncFormatter(text)


def draw(axes: Axes, curves: Mapping[str, Sequence[Curve]], styles: Mapping[str, dict[str, Any]]) -> None:
    """Draw each model's curves: a single one as it is, several as thin lines with their pointwise median.

    Where medians coincide, each remains visible around the later ones, and they alternate in drawing markers.

    Args:
        axes: where to draw.
        curves: curves by model, one per seed.
        styles: arguments of `Axes.plot` by model.
    """
    medians = {model: median_of(model_curves) for model, model_curves in curves.items()}
    wider = min(NESTED, (WIDEST - LINE) / max(len(medians) - 1, 1))
    for i, (model, curve) in enumerate(medians.items()):
        style, others = styles[model], list(medians.values())
        if len(curves[model]) > 1:
            for one in curves[model]:
                axes.plot(*zip(*one, strict=True), color=style["color"], linewidth=0.6, alpha=0.4)
        draw_outline(axes, curve, others[i + 1 :], style["color"], wider)
        turns = [
            [sum(passes_through(other, [point]) for other in part) for part in (others[:i], others)] for point in curve
        ]
        marked = [k for k, (turn, alike) in enumerate(turns) if k % max(alike, 1) == turn]  # `alike` is 0 at NaN
        axes.plot(*zip(*curve, strict=True), markersize=5, markevery=marked, linewidth=LINE, zorder=2.1, **style)


def draw_outline(axes: Axes, curve: Curve, later: Sequence[Curve], color: str, wider: float) -> None:
    """Draw a wider line wherever later curves hide this one, in proportion to their number."""
    hidden = [sum(passes_through(other, part) for other in later) for part in itertools.pairwise(curve)]
    for count, run in itertools.groupby(range(len(hidden)), hidden.__getitem__):
        first, *more = run
        if count:
            axes.plot(
                *zip(*curve[first : first + len(more) + 2], strict=True),
                color=color,
                linewidth=LINE + count * wider,
                zorder=2 - 0.01 * count,
                solid_capstyle="butt",
            )


def median_of(curves: Sequence[Curve]) -> Curve:
    """Return the pointwise median of curves with equal x-coordinates."""
    y = [statistics.median(values) for values in zip(*([y for _, y in curve] for curve in curves), strict=True)]
    return [(x, middle) for (x, _), middle in zip(curves[0], y, strict=True)]


def passes_through(curve: Curve, points: Curve) -> bool:
    """Whether the curve is visually indistinguishable from all points."""
    y = dict(curve)
    return all(x in y and abs(y[x] - value) < CLOSE for x, value in points)


def test_curve(result: Result) -> Curve:
    """Return the test score along the task's coordinate."""
    return result.fit.test.curve


def learning_curve(result: Result) -> Curve:
    """Return the validation score by step."""
    return [(progress.step, progress.validation) for progress in result.history if progress.validation is not None]


def save(figure: Figure, path: Path) -> str:
    """Write a figure as a PNG with 256 colors, close it, and return it as HTML with inline SVG."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=110)
    with Image.open(drawn) as image:  # a third of the bytes, without a visible difference
        image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, format="png", optimize=True)
    plot = plot_of(figure)
    pyplot.close(figure)
    return plot
