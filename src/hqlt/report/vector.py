"""Figures as inline SVG, one per panel, in the page's own colors of text, grid and background."""

from __future__ import annotations

import contextlib
import html
import io
import re
from collections.abc import Iterator, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.transforms import Bbox

from hqlt.report.palette import GRID, INK

MARGIN = 0.05
"""Margin around a panel, in inches."""
KEY = (0.4, 0.14)
"""Width and height of a line in a legend, in inches."""
REPLACED = {
    r"(?s)^.*?(?=<svg)|<metadata>.*?</metadata>|<defs>\s*<style.*?</defs>": "",
    r'<g id="[^"]*"': "<g",
    r' (?:width|height)="[\d.]+pt"': "",
    r' xmlns(?::xlink)?="[^"]*"| version="1.1"': "",
    rf"{INK}\b": "currentColor",
    rf"{GRID}\b": "var(--grid)",
    r"'DejaVu Sans'[^;\"]*": "system-ui, sans-serif",
    r"\s*\n\s*": "\n",
}
"""Replacements in matplotlib's SVG that allow several of them within a page, in the page's colors."""


def plot_of(figure: Figure) -> str:
    """Convert a figure to HTML: the legends, and the panels side by side as far as the page is wide.

    Panels whose axes have the same `gid` are below each other.
    """
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    legends = [legend for part in (figure, *figure.subfigs) for legend in part.legends]
    for artist in (*legends, *figure.axes):
        artist.set_visible(False)
    keys = "".join(key for legend in legends for key in keys_of(legend))
    columns = "".join(column_of(figure, column) for column in columns_of(figure))
    return (f'<div class="keys">{keys}</div>' if keys else "") + f'<div class="plots">{columns}</div>'


def columns_of(figure: Figure) -> list[list[list[Axes]]]:
    """Group the axes into columns of panels; axes at the same place belong to one panel."""
    columns: dict[object, dict[tuple[float, ...], list[Axes]]] = {}
    places: dict[tuple[float, ...], object] = {}
    for axes in figure.axes:
        place = tuple(axes.get_window_extent().bounds)
        column = places.setdefault(place, axes.get_gid() or axes)
        columns.setdefault(column, {}).setdefault(place, []).append(axes)
    return [list(panels.values()) for panels in columns.values()]


def column_of(figure: Figure, panels: Sequence[Sequence[Axes]]) -> str:
    """Convert a column of panels to HTML; all have the same width, so that their axes are aligned."""
    boxes = []
    for panel in panels:
        with shown(panel):
            boxes.append(Bbox.union([box for axes in panel if (box := axes.get_tightbbox()) is not None]))
    whole = Bbox.union(boxes)
    drawn = ""
    for panel, box in zip(panels, boxes, strict=True):
        cut = Bbox.from_extents(whole.x0, box.y0, whole.x1, box.y1).transformed(figure.dpi_scale_trans.inverted())
        with shown(panel):
            drawn += svg_of(figure, cut.padded(MARGIN))
    return f'<div style="--width: {72 * (whole.width / figure.dpi + 2 * MARGIN):.0f}px">{drawn}</div>'


@contextlib.contextmanager
def shown(panel: Sequence[Axes]) -> Iterator[None]:
    """Make a panel visible within this context."""
    for axes in panel:
        axes.set_visible(True)
    yield
    for axes in panel:
        axes.set_visible(False)


def keys_of(legend: Legend) -> Iterator[str]:
    """Yield each entry of a legend as HTML: its line and its label."""
    for handle, label in zip(legend.legend_handles, legend.get_texts(), strict=True):
        figure = Figure(figsize=KEY)
        line = Line2D([0.05, 0.5, 0.95], [0.5] * 3)
        assert handle is not None
        line.update_from(handle)
        line.set(markevery=[1], transform=figure.transFigure, clip_path=None, visible=True)
        figure.add_artist(line)
        yield f"<span>{svg_of(figure)}{html.escape(label.get_text())}</span>"


def svg_of(figure: Figure, box: Bbox | None = None) -> str:
    """Convert a figure, or a box of it in inches, to SVG.

    Ids that occur in several SVGs of a page refer to identical elements.
    """
    written = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "hqlt"}):
        figure.savefig(written, format="svg", transparent=True, bbox_inches=box, metadata={"Date": None})
    drawn = written.getvalue()
    for pattern, replacement in REPLACED.items():
        drawn = re.sub(pattern, replacement, drawn)
    return drawn.strip()
