"""What a retrofit recovered of the original, and whether its FW-memories had a part in it: table, curves, one page.

A row is {"name", "probe"}, the latter of `hqlt.evaluate.probes.probe`; with "bypassed": True it is the row of that name
without its FW-memories, and "tokens" says how many it was trained on. Rows of one name are seeds of one another.
"""

from __future__ import annotations

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
from rich.console import Console

from hqlt.report.palette import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILLION
from hqlt.report.plots import Curve, draw
from hqlt.report.table import Table, TableCell
from hqlt.report.training import leave_report

Row: TypeAlias = Mapping[str, Any]

ORIGINAL, WINDOW = "original", "window + sinks"
"""Names of the rows that all others are measured between: everything recovered, and nothing."""
BYPASSED = ", FW bypassed"
BETWEEN = {ORIGINAL: BLACK, WINDOW: GREY}
COLOURS = (VERMILLION, BLUE, GREEN, PURPLE, ORANGE, SKY)
"""Of the other rows."""
MARKERS = "osD^vPX*h"
BYPASS = 0.02
"""Nats per token: a retrofit that loses less without its FW-memories does not use them."""


def leave_retrofit_report(
    folder: Path, rows: Sequence[Row], told: dict[str, Any], console: Console, *, title: str, introduction: str = ""
) -> None:
    """Write results.json, README.md, curves.png and report.html into the folder; print the table.

    told: how the rows were made; results.json holds it as "run", beside "rows".
    """
    said = " ".join(filter(None, [introduction, verdict(rows)]))
    leave_report(
        folder,
        told,
        {"rows": list(rows)},
        console,
        title=title,
        introduction=said,
        table=table_of_rows(rows),
        figure=figure_of_rows(rows),
        shown=f"{said}\n\n",
        protocol="All models read the same held-out tokens. Facts are four random tokens that name four others, one at "
        "each depth of a text, all asked for behind it; a paragraph is read twice, with other text between.",
        sections=[{"title": "Facts by length and depth", "table": table_of_needles(rows), "plot": None}],
        plot_alt="Loss above the original's by position; facts found by depth; the FW-memories' share by layer",
    )
    console.print(verdict(rows), markup=False)


# What is told of a row


def name_of(row: Row) -> str:
    return f"{row['name']}{BYPASSED if row.get('bypassed') else ''}"


def by_name(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Seeds together, in the order in which they come, each row followed by itself bypassed."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    groups = {
        name + end: [row for row in rows if name_of(row) == name + end] for name in names for end in ("", BYPASSED)
    }
    return {name: group for name, group in groups.items() if group}


def recovered(row: Row, rows: Sequence[Row]) -> float | None:
    """(log ppl of window + sinks − that of the row) / (… − that of the original); None where either is missing."""
    ends = [[each["probe"]["nll"] for each in rows if name_of(each) == name] for name in (WINDOW, ORIGINAL)]
    if not all(ends) or ends[0][0] == ends[1][0]:
        return None
    (window, *_), (original, *_) = ends
    share: float = (window - row["probe"]["nll"]) / (window - original)
    return share


def found(row: Row) -> float:
    """Mean accuracy over all lengths and depths but the end of a text, which a window reaches."""
    accuracies = [one["accuracy"] for one in row["probe"]["needle"] if one["depth"] < 1]
    return statistics.mean(accuracies) if accuracies else math.nan


def share_of(row: Row) -> float:
    shares = [one["share"] for one in row["probe"]["shares"]]
    return math.nan if row.get("bypassed") or not shares else statistics.mean(shares)


def verdict(rows: Sequence[Row]) -> str:
    """Of each model with FW-memories: what it loses without them; a branch that it does not use is called bypassed."""
    told = []
    for name, group in by_name(rows).items():
        without = [row for row in rows if row.get("bypassed") and row["name"] == name]
        if not without or name.endswith(BYPASSED):
            continue
        lost = statistics.median(row["probe"]["nll"] for row in without)
        lost -= statistics.median(row["probe"]["nll"] for row in group)
        kind = "its FW-memories are bypassed" if lost < BYPASS else "its FW-memories are used"
        told.append(f"{name}: {kind}, without them it loses {lost:+.3f} nats per token.")
    return " ".join(told)


# Tables


def table_of_rows(rows: Sequence[Row]) -> Table:
    """A line a name: the median over seeds, and behind it the least and the greatest."""
    first = rows[0]["probe"]
    columns: dict[str, Callable[[Row], float | None]] = {
        f"perplexity from token {first['beyond']} on": lambda row: row["probe"]["perplexity"],
        "recovered %": lambda row: _percent(recovered(row, rows)),
        "recall, nats": lambda row: row["probe"]["recall"]["nll"],
        "recall %": lambda row: _percent(row["probe"]["recall"]["accuracy"]),
        "facts %": lambda row: _percent(found(row)),
        "FW share %": lambda row: _percent(share_of(row)),
    }
    lines = []
    for name, group in by_name(rows).items():
        figures = [_figure([tell(row) for row in group], column) for column, tell in columns.items()]
        lines.append([name, *figures, _tokens(group[0]), _state(group[0])])
    names = ["model", *columns, "trained on, tokens", "state, bytes"]
    return Table(names, [list(map(TableCell, line)) for line in lines], _caption(rows))


def _caption(rows: Sequence[Row]) -> str:
    probe, several = rows[0]["probe"], any(len(group) > 1 for group in by_name(rows).values())
    recall = probe["recall"]
    return (
        f"{probe['rows']} texts of {probe['length']:,} tokens. Recovered: of log perplexity, between {WINDOW} (0) and "
        f"the {ORIGINAL} (100). Recall: the second copy of a paragraph of {recall['paragraph']} tokens, "
        f"{recall['distance']} after the first: loss (of the first copy: {recall['nll_first']:.2f}), and arg-maxima "
        f"that are right. Facts: arg-maxima of their values that are right, mean over lengths and depths but the end. "
        f"FW share: of what the mixers put out, mean over their layers. State: of a sequence; + for each token read. "
        f"{'Median over seeds, the least and the greatest in brackets.' if several else 'One seed.'}"
    )


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _figure(values: Sequence[float | None], column: str) -> str:
    known = [value for value in values if value is not None and not math.isnan(value)]
    if not known:
        return "–"
    form = ".0f" if "%" in column else ".2f"
    brackets = f" ({min(known):{form}}–{max(known):{form}})" if len(known) > 1 else ""
    return format(statistics.median(known), form) + brackets


def _tokens(row: Row) -> str:
    return f"{row['tokens']:,}" if row.get("tokens") else "–"


def _state(row: Row) -> str:
    state = row["probe"]["state"]
    if state is None:
        return "–"
    return f"{state['fixed']:,}" + (f" + {state['per_token']:,}" if state["per_token"] else "")


def table_of_needles(rows: Sequence[Row]) -> Table:
    places = [(one["length"], one["depth"]) for one in rows[0]["probe"]["needle"]]
    lines = []
    for name, group in by_name(rows).items():
        cells = []
        for place in places:
            values = [
                100 * one["accuracy"]
                for row in group
                for one in row["probe"]["needle"]
                if (one["length"], one["depth"]) == place
            ]
            cells.append(TableCell(f"{statistics.median(values):.0f}" if values else "–"))
        lines.append([TableCell(name), *cells])
    caption = "Arg-maxima that are right, %. Depth 0: the beginning of the text; questions count to its length."
    return Table(["model", *(f"{length:,}, {depth:.0%}" for length, depth in places)], lines, caption)


# Curves


def figure_of_rows(rows: Sequence[Row]) -> Figure:
    """Loss by position, the FW-memories' share by layer, and below them the facts found by depth, a panel a length."""
    groups = by_name(rows)
    styles = styles_of_rows(groups)
    lengths = sorted({one["length"] for row in rows for one in row["probe"]["needle"]})
    wide = math.lcm(2, len(lengths))
    top: list[Any] = ["position"] * (wide // 2) + ["shares"] * (wide // 2)
    below: list[Any] = [f"needle {length}" for length in lengths for _ in range(wide // len(lengths))]
    figure = pyplot.figure(figsize=(11, 7.4 + 0.12 * len(groups)), layout="constrained")
    panels = figure.subplot_mosaic([top, below])
    draw_positions(panels["position"], groups, styles)
    draw_shares(panels["shares"], groups, styles)
    for length in lengths:
        draw_needles(panels[f"needle {length}"], groups, styles, length)
    for axes in panels.values():
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    handles = [Line2D([], [], markersize=4, **style) for style in styles.values()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return figure


def styles_of_rows(groups: Mapping[str, Sequence[Row]]) -> dict[str, dict[str, Any]]:
    """A colour and a marker for each model; bypassed, the same one dotted and hollow."""
    own = [name for name in groups if not name.endswith(BYPASSED)]
    colours, marks = itertools.cycle(COLOURS), itertools.cycle(MARKERS)
    chosen = {name: (BETWEEN.get(name) or next(colours), next(marks)) for name in own}
    styles = {}
    for name in groups:
        colour, marker = chosen[name.removesuffix(BYPASSED)]
        styles[name] = {"color": colour, "marker": marker, "label": name}
        if name.endswith(BYPASSED):
            styles[name] |= {"linestyle": ":", "markerfacecolor": "none"}
        elif name == WINDOW:
            styles[name] |= {"linestyle": "--"}
    return styles


def draw_positions(axes: Axes, groups: Mapping[str, Sequence[Row]], styles: dict[str, dict[str, Any]]) -> None:
    """Nats above the original's, where it is there: so the text's own ups and downs are gone."""
    base = groups.get(ORIGINAL)
    level = [one["nll"] for one in base[0]["probe"]["by_position"]] if base else itertools.repeat(0.0)

    def curve(row: Row) -> Curve:
        bins = zip(row["probe"]["by_position"], level, strict=bool(base))
        return [((one["begin"] + one["end"] - 1) / 2, one["nll"] - under) for one, under in bins]

    draw(axes, {name: [curve(row) for row in group] for name, group in groups.items()}, styles)
    for window in {row["probe"]["window"] for group in groups.values() for row in group} - {None}:
        axes.axvline(window, color=GREY, linewidth=0.8, linestyle=(0, (1, 3)))
        place: dict[str, Any] = {
            "xy": (window, 0.98),
            "xycoords": ("data", "axes fraction"),
            "ha": "right",
            "va": "top",
            "rotation": 90,
        }
        axes.annotate("window", fontsize=8, color=GREY, **place)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    axes.set_xlabel("position, tokens")
    axes.set_ylabel("nats per token" + (" above the original" if base else ""))
    axes.set_title("Loss by position")


def draw_shares(axes: Axes, groups: Mapping[str, Sequence[Row]], styles: dict[str, dict[str, Any]]) -> None:
    """By layer, the median over seeds that have an FW-memory there. A branch that is bypassed lies at 0."""
    for name, group in groups.items():
        by_layer: dict[int, list[float]] = {}
        for one in itertools.chain.from_iterable(row["probe"]["shares"] for row in group if not row.get("bypassed")):
            by_layer.setdefault(one["layer"], []).append(100 * one["share"])
        curve = [(layer, statistics.median(shares)) for layer, shares in sorted(by_layer.items())]
        if curve:
            axes.plot(*zip(*curve, strict=True), markersize=4, **styles[name])
    axes.set_ylim(-1, max(25.0, 1.05 * axes.dataLim.y1) if axes.lines else 100)
    axes.set_xlabel("layer")
    axes.set_ylabel("share of the FW-memory, %")
    axes.set_title("What the FW-memories contribute")
    if not axes.lines:
        axes.text(0.5, 0.5, "no FW-memories", transform=axes.transAxes, ha="center", color=GREY)


def draw_needles(
    axes: Axes, groups: Mapping[str, Sequence[Row]], styles: dict[str, dict[str, Any]], length: int
) -> None:
    def curve(row: Row) -> Curve:
        ones = [one for one in row["probe"]["needle"] if one["length"] == length]
        return sorted((100 * one["depth"], 100 * one["accuracy"]) for one in ones)

    draw(axes, {name: [curve(row) for row in group] for name, group in groups.items()}, styles)
    axes.set_ylim(-3, 103)
    axes.set_xlabel("depth, %")
    axes.set_ylabel("facts found, %")
    axes.set_title(f"Facts in {length:,} tokens")
