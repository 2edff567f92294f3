"""The section of a page on kept KV entries: a shaded text, and a plot of all heads over time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from torch import nn

from hqlt.data import Tokenizer
from hqlt.layer import HybridMemory
from hqlt.report.kept import KeptPairs, kept_pairs, page_tokens
from hqlt.report.palette import GREY, KV
from hqlt.report.plots import save

SHOWN = 480
"""Number of tokens of the text on a page."""
NAMED = 16
"""Maximum number of heads that have labels of their own; if there are more, layers are labeled."""
SHADES = LinearSegmentedColormap.from_list("kept", [KV + "00", KV]).with_extremes(bad=GREY + "66")


def keeps(model: nn.Module) -> bool:
    """Whether any layer of the model keeps entries beyond its window."""
    return any(isinstance(part, HybridMemory) and part.kv is not None and part.kv.kept for part in model.modules())


def kept_in_text(model: nn.Module, tokens: Sequence[int], tokenizer: Tokenizer, folder: Path) -> dict[str, Any] | None:
    """Make a page's section `kept`: which entries of a text a language model keeps until its end.

    Args:
        model: a language model.
        tokens: the text, of which the first SHOWN tokens are used.
        tokenizer: the model's tokenizer.
        folder: where kept.png is written.

    Returns:
        The section, or None if the model keeps no entries beyond its windows.
    """
    if not keeps(model):
        return None
    shown = list(tokens[:SHOWN])
    device = next(model.parameters()).device
    pairs = kept_pairs(model, torch.tensor([shown], device=device))
    stream = tokenizer.stream()
    texts = [stream.add(token) for token in shown]
    texts[-1] += stream.end()
    return {
        "tokens": page_tokens(pairs, texts),
        "heads": len(pairs.heads),
        "layers": len({layer for layer, _ in pairs.heads}),
        "plot": save(figure_of_kept(pairs), folder / "kept.png"),
    }


def figure_of_kept(pairs: KeptPairs) -> Figure:
    """Plot the first row of the batch: a row per head, a column per token."""
    height = min(max(0.22 * len(pairs.heads), 1.2), 8) + 0.9
    figure = pyplot.figure(figsize=(11, height), layout="constrained")
    draw_kept(figure.subplots(), pairs)
    return figure


def draw_kept(axes: Axes, pairs: KeptPairs, name: str = "token") -> None:
    """Draw how long entries stay as shades, with a color bar; the first token is at 1."""
    n, _, t = pairs.until.shape
    stayed = pairs.stayed()[:, 0].cpu().numpy()
    image = axes.imshow(
        stayed,
        cmap=SHADES,
        vmin=0,
        vmax=1,
        aspect="auto",
        interpolation="nearest",
        extent=(0.5, t + 0.5, n - 0.5, -0.5),
    )
    axes.set_xlabel(f"{name} (gray: in the window at the end)")
    places = range(n) if n <= NAMED else [i for i, (_, head) in enumerate(pairs.heads) if head == 0]
    labels = [f"{layer + 1}.{head + 1}" if n <= NAMED else f"{layer + 1}" for layer, head in pairs.heads]
    axes.set_yticks(list(places), [labels[i] for i in places], fontsize=8)
    axes.set_ylabel("layer.head" if n <= NAMED else "layer")
    bar = axes.figure.colorbar(image, cax=axes.inset_axes((1.01, 0, 0.012, 1)), ticks=[0, 1])
    bar.ax.set_yticklabels(["dropped at\nthe window", "kept until\nthe end"], fontsize=8)
