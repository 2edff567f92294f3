"""The report of a retrofit: how much of the original is recovered, and how much of that the FW-memories contribute.

A row is {"name", "probe"}, where "probe" is the result of `hqlt.evaluate.probes.probe`. Rows with "bypassed": True are
those of the same name without FW-memories. "tokens" is the number of training tokens. Rows with the same name are
different seeds.
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
from hqlt.report.training import write_run_report

Row: TypeAlias = Mapping[str, Any]

ORIGINAL, WINDOW = "original", "window + sinks"
"""Names of the rows that define 100% and 0% recovered."""
BYPASSED = ", FW bypassed"
REFERENCE_COLOURS = {ORIGINAL: BLACK, WINDOW: GREY}
COLOURS = (VERMILLION, BLUE, GREEN, PURPLE, ORANGE, SKY)
"""Colors of the other rows."""
MARKERS = "osD^vPX*h"
MOST_CURVES = 6
"""With more models than this, dots take the place of curves."""
UNUSED_BELOW = 0.02
"""FW-memories count as unused if bypassing them increases the loss by less than this, in nats per token."""


def write_retrofit_report(
    folder: Path, rows: Sequence[Row], run_info: dict[str, Any], console: Console, *, title: str, introduction: str = ""
) -> None:
    """Write results.json, README.md, curves.png and report.html, and print the table.

    Args:
        folder: where to write.
        rows: the results.
        run_info: how they were obtained; saved as "run" in results.json.
        console: where to print.
        title: title of the page.
        introduction: first sentences of the page.
    """
    introduction = " ".join(filter(None, [introduction, verdict(rows)]))
    write_run_report(
        folder,
        run_info,
        {"rows": list(rows)},
        console,
        title=title,
        introduction=introduction,
        table=table_of_rows(rows),
        figure=figure_of_rows(rows),
        shown=f"{introduction}\n\n",
        protocol="All models read the same held-out tokens. A fact maps four random tokens to four others. One is at "
        "each depth of a text, and all are queried after it. For recall, a paragraph is read twice, with other text in "
        "between.",
        sections=[{"title": "Facts by length and depth", "table": table_of_needles(rows), "plot": None}],
        plot_alt="Loss above the original's by position; facts found by depth; the FW-memories' share by layer",
    )
    console.print(verdict(rows), markup=False)


# Values of a row


def name_of(row: Row) -> str:
    """The name of a row, with a suffix if it is bypassed."""
    return f"{row['name']}{BYPASSED if row.get('bypassed') else ''}"


def by_name(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Group the rows by name, in the order of their first row. Bypassed rows follow those they belong to."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    groups = {
        name + end: [row for row in rows if name_of(row) == name + end] for name in names for end in ("", BYPASSED)
    }
    return {name: group for name, group in groups.items() if group}


def recovered(row: Row, rows: Sequence[Row]) -> float | None:
    """The recovered share of log perplexity; None if one of the two reference rows is missing.

    (log ppl of window + sinks − log ppl of the row) / (log ppl of window + sinks − log ppl of the original)
    """
    ends = [[each["probe"]["nll"] for each in rows if name_of(each) == name] for name in (WINDOW, ORIGINAL)]
    if not all(ends) or ends[0][0] == ends[1][0]:
        return None
    (window, *_), (original, *_) = ends
    share: float = (window - row["probe"]["nll"]) / (window - original)
    return share


def facts_found(row: Row) -> float:
    """Mean accuracy over all lengths and depths, except depth 1, which lies within the window."""
    accuracies = [one["accuracy"] for one in row["probe"]["needle"] if one["depth"] < 1]
    return statistics.mean(accuracies) if accuracies else math.nan


def fw_share(row: Row) -> float:
    """Mean share of the FW-memories over layers; nan if there are none or they are bypassed."""
    shares = [one["share"] for one in row["probe"]["shares"]]
    return math.nan if row.get("bypassed") or not shares else statistics.mean(shares)


def verdict(rows: Sequence[Row]) -> str:
    """A sentence for each model with FW-memories: whether it uses them, and how much it loses without them."""
    sentences = []
    for name, group in by_name(rows).items():
        without = [row for row in rows if row.get("bypassed") and row["name"] == name]
        if not without or name.endswith(BYPASSED):
            continue
        lost = statistics.median(row["probe"]["nll"] for row in without)
        lost -= statistics.median(row["probe"]["nll"] for row in group)
        used = "are not used" if lost < UNUSED_BELOW else "are used"
        sentences.append(f"{name}: its FW-memories {used}; bypassing them changes the loss by {lost:+.3f} nats/token.")
    return " ".join(sentences)


# Tables


def table_of_rows(rows: Sequence[Row]) -> Table:
    """One line per name: the median over seeds, with minimum and maximum in parentheses."""
    first = rows[0]["probe"]
    columns: dict[str, Callable[[Row], float | None]] = {
        f"perplexity from token {first['beyond']} on": lambda row: row["probe"]["perplexity"],
        "recovered %": lambda row: _percent(recovered(row, rows)),
        "recall, nats": lambda row: row["probe"]["recall"]["nll"],
        "recall %": lambda row: _percent(row["probe"]["recall"]["accuracy"]),
        "facts %": lambda row: _percent(facts_found(row)),
        "FW share %": lambda row: _percent(fw_share(row)),
    }
    lines = []
    for name, group in by_name(rows).items():
        values = [_median([value_of(row) for row in group], column) for column, value_of in columns.items()]
        lines.append([name, *values, _tokens(group[0]), _state(group[0])])
    names = ["model", *columns, "training tokens", "state, bytes"]
    return Table(names, [list(map(TableCell, line)) for line in lines], _caption(rows))


def _caption(rows: Sequence[Row]) -> str:
    probe, several = rows[0]["probe"], any(len(group) > 1 for group in by_name(rows).values())
    recall = probe["recall"]
    return (
        f"{probe['rows']} texts of {probe['length']:,} tokens. Recovered: share of log perplexity between {WINDOW} (0) "
        f"and the {ORIGINAL} (100). Recall: loss and accuracy on the second copy of a paragraph of "
        f"{recall['paragraph']} tokens, {recall['distance']} tokens after the first (loss on the first copy: "
        f"{recall['nll_first']:.2f}). Facts: accuracy on their values, mean over lengths and depths except 100%. FW "
        f"share: the FW-memory's part of the mixers' output, mean over layers. State: bytes per sequence, + bytes per "
        f"token read. {'Median over seeds, with minimum and maximum in parentheses.' if several else 'One seed.'}"
    )


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _median(values: Sequence[float | None], column: str) -> str:
    known = [value for value in values if value is not None and not math.isnan(value)]
    if not known:
        return "–"
    form = ".0f" if "%" in column else ".2f"
    extremes = f" ({min(known):{form}}–{max(known):{form}})" if len(known) > 1 else ""
    return format(statistics.median(known), form) + extremes


def _tokens(row: Row) -> str:
    return f"{row['tokens']:,}" if row.get("tokens") else "–"


def _state(row: Row) -> str:
    state = row["probe"]["state"]
    if state is None:
        return "–"
    return f"{state['fixed']:,}" + (f" + {state['per_token']:,}" if state["per_token"] else "")


def table_of_needles(rows: Sequence[Row]) -> Table:
    """Accuracy on facts, one column per length and depth."""
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
    caption = "Accuracy, %. Columns: length of the text including the queries, and depth (0%: its beginning)."
    return Table(["model", *(f"{length:,}, {depth:.0%}" for length, depth in places)], lines, caption)


# Curves


def figure_of_rows(rows: Sequence[Row]) -> Figure:
    """Loss by position and the FW-memories' share by layer; below, facts found by depth, one panel per length.

    With many models, one line of dots per model instead (`dots_of_rows`).
    """
    groups = by_name(rows)
    if len({row["name"] for row in rows}) > MOST_CURVES:
        return dots_of_rows(rows)
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


def dots_of_rows(rows: Sequence[Row]) -> Figure:
    """One line per model, one panel per score: a dot per seed, hollow with FW-memories bypassed, a bar at the median.

    Vertical lines mark the original and window + sinks.
    """
    panels: dict[str, Callable[[Row], float | None]] = {
        "recovered, %": lambda row: _percent(recovered(row, rows)),
        "recall of a paragraph, nats per token": lambda row: row["probe"]["recall"]["nll"],
        "facts found, %": lambda row: _percent(facts_found(row)),
    }
    groups = by_name(rows)
    names = [name for name in groups if not name.endswith(BYPASSED) and name not in REFERENCE_COLOURS]
    figure = pyplot.figure(figsize=(12, 1.2 + 0.3 * len(names)), layout="constrained")
    for axes, (title, value_of) in zip(figure.subplots(1, len(panels), sharey=True), panels.items(), strict=True):
        for name, colour in REFERENCE_COLOURS.items():
            for row in groups.get(name, []):
                axes.axvline(value_of(row), color=colour, linewidth=1, linestyle="--", label=name)
        for y, name in enumerate(names):
            for group, face in ((groups[name], VERMILLION), (groups.get(name + BYPASSED, []), "none")):
                values = [value for row in group if (value := value_of(row)) is not None]
                axes.scatter(values, [y] * len(values), s=22, facecolor=face, edgecolor=VERMILLION, zorder=3)
                if values:
                    axes.plot([statistics.median(values)] * 2, [y - 0.3, y + 0.3], color=VERMILLION, linewidth=1.2)
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    dot: dict[str, Any] = {"linestyle": "", "marker": "o", "color": VERMILLION, "markersize": 5}
    handles = [Line2D([], [], color=colour, linestyle="--", label=name) for name, colour in REFERENCE_COLOURS.items()]
    handles += [
        Line2D([], [], label="one seed", **dot),
        Line2D([], [], label="its FW-memories bypassed", markerfacecolor="none", **dot),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    return figure


def styles_of_rows(groups: Mapping[str, Sequence[Row]]) -> dict[str, dict[str, Any]]:
    """One color and marker per model; bypassed rows have the same, with dotted lines and hollow markers."""
    own = [name for name in groups if not name.endswith(BYPASSED)]
    colours, marks = itertools.cycle(COLOURS), itertools.cycle(MARKERS)
    chosen = {name: (REFERENCE_COLOURS.get(name) or next(colours), next(marks)) for name in own}
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
    """Draw the loss minus the original's, if there is a row of it; the difference removes variations of the text."""
    base = groups.get(ORIGINAL)
    baseline = [one["nll"] for one in base[0]["probe"]["by_position"]] if base else itertools.repeat(0.0)

    def curve(row: Row) -> Curve:
        bins = zip(row["probe"]["by_position"], baseline, strict=bool(base))
        return [((one["begin"] + one["end"] - 1) / 2, one["nll"] - level) for one, level in bins]

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
    """Draw the share by layer, the median over seeds with an FW-memory there. Unused FW-memories lie at 0."""
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
    axes.set_title("Contribution of the FW-memories")
    if not axes.lines:
        axes.text(0.5, 0.5, "no FW-memories", transform=axes.transAxes, ha="center", color=GREY)


def draw_needles(
    axes: Axes, groups: Mapping[str, Sequence[Row]], styles: dict[str, dict[str, Any]], length: int
) -> None:
    """Draw the accuracy on facts by depth, for texts of one length."""

    def curve(row: Row) -> Curve:
        ones = [one for one in row["probe"]["needle"] if one["length"] == length]
        return sorted((100 * one["depth"], 100 * one["accuracy"]) for one in ones)

    draw(axes, {name: [curve(row) for row in group] for name, group in groups.items()}, styles)
    axes.set_ylim(-3, 103)
    axes.set_xlabel("depth, %")
    axes.set_ylabel("facts found, %")
    axes.set_title(f"Facts in {length:,} tokens")
