"""Kept KV entries: the record equals what the reads depend on, and pages show it."""

from __future__ import annotations

import pytest
import torch
from matplotlib import pyplot
from PIL import Image

import hqlt
from hqlt.data import load_tokenizer
from hqlt.report import KeptPairs, kept_pairs
from hqlt.report.kept import kept_during, page_tokens
from hqlt.report.kept_page import figure_of_kept, kept_in_text
from hqlt.report.page import write_page
from tests.language.conftest import build
from tests.layers import GROUPED, build_layer, tokens

KEPT = {"retention": "random", "kept": 2, "sinks": 1}


@pytest.mark.parametrize("blend", ["kv-only", "delayed-chunk"])
def test_an_entry_is_visible_exactly_where_reads_depend_on_it(blend):
    """Replacing a token changes what a head reads as long as the token's entry is visible."""
    layer = build_layer("", 3, blend=blend, **KEPT, **GROUPED)
    x, t = tokens(1, 14), 14
    resets = torch.arange(t)[None] == 9
    pairs = kept_during(layer, lambda: layer(x, None, resets))
    reads = []
    layer.kv.register_forward_hook(lambda kv, given, out: reads.append(out))
    layer(x, None, resets)
    for j in range(t):
        other = x.clone()
        other[:, j] += 1.0
        layer(other, None, resets)
        changed = (reads[-1] != reads[0]).any(dim=-1).unflatten(2, (2, 2)).any(dim=3)[0, j + 1 :]  # two heads share one
        expected = torch.arange(j + 1, t)[:, None] < pairs.until[:, 0, j]
        assert changed.equal(expected), j
    assert pairs.heads == [(0, 0), (0, 1)]
    assert (pairs.leaves <= pairs.until).all() and pairs.until[:, 0, 0].tolist() == [9, 9]
    if blend == "kv-only":
        assert pairs.leaves[0, 0].tolist() == [*range(3, 9), 9, 9, 9, 12, 13, 14, 14, 14]
    shorter = kept_during(layer, lambda: layer(x[:, :8]))
    assert all(one.equal(other) for one, other in zip(pairs.before(8)[:2], shorter[:2], strict=True))


def test_all_layers_that_keep_entries_are_recorded():
    model = build(layer_kinds=["fw", "hybrid", "kv", "hybrid"], num_hidden_layers=4)
    with pytest.raises(ValueError, match=r"at least one layer that keeps entries .*`hqlt.with_retention`"):
        kept_pairs(model, torch.arange(8)[None])
    pairs = kept_pairs(hqlt.with_retention(model, **KEPT), torch.arange(20).view(2, 10))
    assert pairs.heads == [(1, 0), (1, 1), (3, 0), (3, 1)]
    assert pairs.until.shape == pairs.leaves.shape == (4, 2, 10)
    assert (pairs.until[..., 0] == 10).all()  # a sink
    beyond = (pairs.until == 10) & (pairs.leaves < 10)
    assert (beyond.sum(dim=-1) == 3).all()


PAIRS = KeptPairs(
    torch.tensor([[[4, 2, 4, 4]], [[2, 3, 4, 4]]]), torch.tensor([[[2, 2, 4, 4]], [[2, 3, 4, 4]]]), [(0, 0), (1, 0)]
)


def test_the_tokens_of_a_page():
    assert PAIRS.at_the_end().tolist() == [[0.5, 0.0, 1.0, 1.0]]
    stayed = PAIRS.stayed()[:, 0]
    assert stayed[:, :2].tolist() == [[1.0, 0.0], [0.0, 0.0]] and stayed[:, 2:].isnan().all()
    first, second, third, _ = page_tokens(PAIRS, "<bc>")
    assert first == {
        "text": "<",
        "share": 0.5,
        "recent": False,
        "title": "token 1: kept by 1 of 2 heads; visible to 3 tokens",
    }
    assert second["share"] == 0.0 and third["recent"] and third["title"] == "token 3: in the window"


def test_a_page_shows_kept_entries(tmp_path):
    model, tokenizer = build(), load_tokenizer("bytes")
    text = tokenizer.encode("<b>é</b> and more, longer than the window")
    assert kept_in_text(model, text, tokenizer, tmp_path) is None
    kept = kept_in_text(hqlt.with_retention(model, **KEPT), text, tokenizer, tmp_path)
    assert "".join(token["text"] for token in kept["tokens"]) == "<b>é</b> and more, longer than the window"
    assert (kept["heads"], kept["layers"]) == (4, 2)
    with Image.open(tmp_path / "kept.png") as picture:
        assert picture.width > 1000
    write_page(tmp_path / "page.html", title="t", introduction="i", protocol="p", settings="s", kept=kept)
    page = (tmp_path / "page.html").read_text()
    assert "how many of the 4 KV heads\n(in 2 layers) still keep" in page
    assert page.count('<span class="recent" title=') == 4 and page.count("rgba(var(--kv),1.00)") >= 1
    assert "&lt;</span>" in page and "<b>é" not in page
    write_page(tmp_path / "page.html", title="t", introduction="i", protocol="p", settings="s", kept=None)
    assert "Which KV entries are kept" not in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("heads", "named"),
    [
        ([(0, 0), (0, 1), (2, 0)], ["1.1", "1.2", "3.1"]),
        ([(layer, head) for layer in (1, 4) for head in range(9)], ["2", "5"]),
    ],
)
def test_a_plot_labels_heads_or_if_there_are_many_layers(heads, named):
    index = torch.arange(30).expand(len(heads), 1, 30)
    figure = figure_of_kept(KeptPairs((index + 9).clamp(max=30), (index + 4).clamp(max=30), heads))
    (axes,) = figure.axes
    (bar,) = axes.child_axes
    assert [label.get_text() for label in axes.get_yticklabels()] == named
    assert axes.get_xlim() == (0.5, 30.5)
    figure.canvas.draw()
    box = bar.get_tightbbox()
    assert box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
    pyplot.close(figure)
