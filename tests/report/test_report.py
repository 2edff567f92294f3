import io
import re

import pytest
import torch
from matplotlib import pyplot
from rich.console import Console

from hqlt.evaluate import Score
from hqlt.model import HQLTConfig, HQLTForCausalLM
from hqlt.report import memory_shares
from hqlt.report.page import write_page
from hqlt.report.plots import figure_of, save
from hqlt.report.table import TOO_SMALL, table_of
from hqlt.train.fit import Budget, Fit, Progress
from hqlt.train.grid import Result
from hqlt.train.task_cell import TaskCell


def result(model, task, value, seed=0):
    metric = "bits" if task == "text" else "accuracy"
    cell = TaskCell(model=model, config={}, task=task, task_options={}, budget=Budget(steps=2, batch_size=1), seed=seed)
    score = Score(metric, value, [(1.0, value), (2.0, value)])
    history = [Progress(1, 1.0, 1.0, 0.5, 10, value), Progress(2, 1.0, 1.0, 1.0, 20, value)]
    return Result(cell, 1000, 1.0, Fit(2, score, score), history)


RESULTS = [
    result("DeltaNet", "parity", 0.5),
    result("DeltaNet", "parity", 1.0, seed=1),
    result("DeltaNet", "parity", 0.25, seed=2),
    result("Synchronous", "parity", 0.75),
    result("DeltaNet", "text", 2.5),
    result("Synchronous", "text", 2.25),
]


def test_a_table_shows_medians_seeds_and_the_best_model():
    table = table_of(RESULTS)
    assert table.columns == ["model", "parity, accuracy %", "text, bits/byte", "seconds"]
    delta, synchronous = table.rows
    assert delta[1].text == "50.0 (25.0 50.0 100.0)"
    assert delta[2].text == "2.500"
    assert [cell.best for cell in synchronous[1:3]] == [True, True]
    assert [cell.best for cell in delta[1:3]] == [False, False]
    assert "| **75.0** | **2.250** |" in table.as_markdown()
    console = Console(record=True, width=120, file=io.StringIO())
    console.print(table.for_terminal())
    assert "2.250" in console.export_text()


def test_a_table_compares_with_the_paper():
    table = table_of(RESULTS, {"parity": {"Synchronous": 100.0}, "text": {}})
    assert table.columns == ["model", "parity, accuracy %", "paper", "text, bits/byte", "seconds"]
    assert [row[2].text for row in table.rows] == ["–", "100.0"]


def test_seeds_are_sorted_from_worst_to_best():
    table = table_of([result("DeltaNet", "text", value, seed) for seed, value in enumerate((2.0, 3.0, 2.5))])
    assert table.rows[0][1].text == "2.500 (3.000 2.500 2.000)"


def test_a_page_is_self_contained_and_escapes_its_content(tmp_path):
    write_page(
        tmp_path / "page.html",
        title="<script>alert(1)</script>",
        introduction="i",
        table=table_of(RESULTS),
        plot="",
        samples=[{"model": "m", "temperature": 1, "seed": 0, "prompt": "def ", "text": "<b>x</b>"}],
        protocol="p",
        settings="s",
    )
    page = (tmp_path / "page.html").read_text()
    assert "<script" not in page
    assert "&lt;b&gt;x&lt;/b&gt;" in page
    assert not re.findall(r'(?:src|href)="(?!data:)', page)


def test_a_page_may_show_a_sample_and_folds_its_settings(tmp_path):
    content = {"title": "t", "introduction": "i", "protocol": "p", "settings": '{"seed": 0}'}
    write_page(tmp_path / "page.html", **content, sample={"prompt": "def ", "text": "f(<x>)"})
    page = (tmp_path / "page.html").read_text()
    assert "<h2>A sample</h2>" in page
    assert "<pre>def <b>f(&lt;x&gt;)</b></pre>" in page
    assert page.index("<details>") < page.index("seed") < page.index("</details>")
    write_page(tmp_path / "page.html", **content)
    assert "A sample" not in (tmp_path / "page.html").read_text()


def test_plots_have_the_colors_of_the_page(tmp_path):
    """They contain no image, no background and nothing black."""
    figure = figure_of(RESULTS)
    content = {"title": "t", "introduction": "i", "protocol": "p", "settings": "s", "table": table_of(RESULTS)}
    write_page(tmp_path / "page.html", **content, plot=save(figure, tmp_path / "curves.png"))
    page = (tmp_path / "page.html").read_text()
    light, dark = page.split("prefers-color-scheme: dark")
    for name in ("ink", "paper", "quiet", "line", "grid", "box", "kv", "fw"):
        assert f"--{name}: " in light and f"--{name}: " in dark.partition("</style>")[0]
    assert "<img" not in page and "<image" not in page and "<style" not in page.partition("</style>")[2]
    assert page.count("<svg") == 2 + 4, "legend entries of two models, two panels for each of two experiments"
    assert "#000000" not in page and "currentColor" in page and "var(--grid)" in page
    assert ">accuracy above chance, %</text>" in page, "text is text"
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page) and "DejaVu" not in page
    names = re.findall(r' id="([^"]+)"', page)
    for name in re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', page):
        assert max(name) in names


def test_panels_of_an_experiment_are_below_each_other(tmp_path):
    plot = save(figure_of(RESULTS), tmp_path / "curves.png")
    keys, plots = plot.split('<div class="plots">')
    assert re.findall(r"</svg>([^<]+)</span>", keys) == ["DeltaNet", "Synchronous"]
    columns = plots.split('<div style="--width: ')[1:]
    assert [column.count("<svg") for column in columns] == [2, 2]
    assert ["parity" in column for column in columns] == [True, False]
    for column in columns:
        first, second = (float(box.split()[2]) for box in re.findall(r'viewBox="([^"]+)"', column))
        assert first == pytest.approx(second) == pytest.approx(float(column.partition("px")[0]), abs=1)


def test_overlapping_axes_are_one_panel(tmp_path):
    figure, (top, bottom) = pyplot.subplots(2, 1)
    bottom.twinx().plot([1, 2])
    top.imshow([[1.0]])
    plot = save(figure, tmp_path / "x.png")
    assert plot.count("<svg") == plot.count("--width") == 2
    assert 'class="keys"' not in plot and "data:image/png" in plot, "a heat map is an image within it"


def test_a_table_scrolls_horizontally_with_a_fixed_first_column(tmp_path):
    content = {"title": "t", "introduction": "i", "protocol": "p", "settings": "s", "table": table_of(RESULTS)}
    write_page(tmp_path / "page.html", **content, plot="")
    page = (tmp_path / "page.html").read_text()
    assert '<div class="wide"><table>' in page and re.search(r"\.wide \{[^}]*overflow-x: auto", page)
    assert re.search(r"td:first-child \{[^}]*position: sticky", page) and re.search(r"td \{[^}]*nowrap", page)


def test_quick_tables_mark_no_best_score(tmp_path):
    content = {"title": "t", "introduction": "i", "protocol": "p", "settings": "s"}
    for quick in (False, True):
        table = table_of(RESULTS, quick=quick)
        write_page(tmp_path / "page.html", **content, table=table, plot="")
        page = (tmp_path / "page.html").read_text()
        assert ('class="best"' in page) == ("**" in table.as_markdown()) == (TOO_SMALL not in page) == (not quick)


def model(**options):
    options = {"hidden_size": 16, "num_heads": 2, "num_hidden_layers": 2, "vocab_size": 8, "window": 4} | options
    return HQLTForCausalLM(HQLTConfig(**options, intermediate_size=16))


@pytest.mark.parametrize("mixer", ["vector", "scalar", "sum"])
def test_shares_of_the_memories(mixer):
    hybrid = model(mixer=mixer)
    tokens = torch.randint(0, 8, (3, 10))
    shares = memory_shares(hybrid, tokens)
    assert shares.fw.shape == shares.gate.shape == (2, 3, 10)
    assert (shares.fw > 0).all()
    assert (shares.fw < 1).all()
    if mixer == "sum":
        assert (shares.gate == 1).all()


def test_an_unused_memory_has_no_share():
    hybrid = model(blend="delayed-streaming")
    shares = memory_shares(hybrid, torch.randint(0, 8, (1, 10)))
    assert (shares.fw[..., :4] == 0).all()  # nothing has left the window yet
    assert (shares.fw[..., 4:] > 0).all()


def test_a_model_without_two_memories_is_refused():
    with pytest.raises(ValueError, match="at least one layer that mixes two memories"):
        memory_shares(model(layer_kinds=["kv", "fw"]), torch.zeros(1, 3, dtype=torch.long))
