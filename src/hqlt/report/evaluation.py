"""Plots of `hqlt eval`: bits by position, and keys found by length and depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hqlt.evaluate.lengths import Bin
from hqlt.evaluate.retrieval import RetrievalScore
from hqlt.report.palette import GREY, VERMILLION


def figure_of_lengths(bins: Sequence[Bin], reset_every: int, unit: str) -> Figure:
    """Plot bits by position, with carried memories and with memories emptied every `reset_every` tokens."""
    figure, axes = pyplot.subplots(figsize=(6, 3.8), layout="constrained")
    middles = [(part.begin + part.end) / 2 for part in bins]
    carried = [part.carried for part in bins]
    axes.plot(middles, carried, marker="o", markersize=3, color=VERMILLION, label="memories carried")
    emptied = [part.emptied for part in bins]
    axes.plot(middles, emptied, linestyle="--", color=GREY, label=f"memories emptied every {reset_every:,} tokens")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    axes.set_xlabel("position in the text, tokens")
    axes.set_ylabel(f"bits per {unit}")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


def figure_of_retrieval(found: Mapping[str, Sequence[RetrievalScore]]) -> Figure:
    """Plot how often the key is found by length and depth, as one heat map per haystack."""
    figure, panels = pyplot.subplots(
        1, len(found), figsize=(1.2 + 4.6 * len(found), 3.6), squeeze=False, layout="constrained"
    )
    for axes, (name, results) in zip(panels.flat, found.items(), strict=True):
        heat_map(axes, name, results)
    return figure


def heat_map(axes: Axes, name: str, results: Sequence[RetrievalScore]) -> None:
    lengths = sorted({result.length for result in results})
    depths = sorted({result.depth for result in results})
    by_place = {(result.depth, result.length): result for result in results}
    shares = [
        [by_place[depth, length].right / by_place[depth, length].trials for length in lengths] for depth in depths
    ]
    axes.imshow(shares, cmap="Greens", vmin=0, vmax=1, aspect="auto")
    for y, row in enumerate(shares):
        for x, share in enumerate(row):
            shade = "white" if share > 0.6 else "#111111"
            axes.text(x, y, f"{100 * share:.0f}", ha="center", va="center", fontsize=8, color=shade)
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=30, ha="right")
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axes.set_xlabel("length, tokens")
    axes.set_ylabel("depth of the key")
    axes.set_title(f"{name}: keys found, %")
