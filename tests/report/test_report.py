import io
import re

import pytest
import torch
from rich.console import Console

from hqlt.evaluate import Score
from hqlt.model import HQLTConfig, HQLTForCausalLM
from hqlt.report import memory_shares
from hqlt.report.page import write_page
from hqlt.report.table import table_of
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


def test_a_table_shows_medians_all_seeds_and_the_best():
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


def test_the_papers_figures_stand_beside_ours():
    table = table_of(RESULTS, {"parity": {"Synchronous": 100.0}, "text": {}})
    assert table.columns == ["model", "parity, accuracy %", "paper", "text, bits/byte", "seconds"]
    assert [row[2].text for row in table.rows] == ["–", "100.0"]


def test_from_worst_to_best_whatever_is_better():
    table = table_of([result("DeltaNet", "text", value, seed) for seed, value in enumerate((2.0, 3.0, 2.5))])
    assert table.rows[0][1].text == "2.500 (3.000 2.500 2.000)"


def test_a_page_stands_alone_and_escapes_what_it_is_given(tmp_path):
    write_page(
        tmp_path / "page.html",
        title="<script>alert(1)</script>",
        introduction="i",
        table=table_of(RESULTS),
        plot="data:image/png;base64,",
        samples=[{"model": "m", "temperature": 1, "seed": 0, "prompt": "def ", "text": "<b>x</b>"}],
        protocol="p",
        settings="s",
    )
    page = (tmp_path / "page.html").read_text()
    assert "<script" not in page
    assert "&lt;b&gt;x&lt;/b&gt;" in page
    assert not re.findall(r'(?:src|href)="(?!data:)', page)


def test_a_page_has_a_place_for_a_sample_and_folds_its_settings(tmp_path):
    content = {"title": "t", "introduction": "i", "protocol": "p", "settings": '{"seed": 0}'}
    write_page(tmp_path / "page.html", **content, sample={"prompt": "def ", "text": "f(<x>)"})
    page = (tmp_path / "page.html").read_text()
    assert "<h2>A sample</h2>" in page
    assert "<pre>def <b>f(&lt;x&gt;)</b></pre>" in page
    assert page.index("<details>") < page.index("seed") < page.index("</details>")
    write_page(tmp_path / "page.html", **content)
    assert "A sample" not in (tmp_path / "page.html").read_text()


def test_a_page_serves_dark_screens_and_narrow_ones(tmp_path):
    """A plot is turned dark, a row becomes a list in which each number has its column's name."""
    write_page(
        tmp_path / "page.html",
        title="t",
        introduction="i",
        table=table_of(RESULTS),
        plot="data:image/png;base64,",
        protocol="p",
        settings="s",
    )
    page = (tmp_path / "page.html").read_text()
    assert "prefers-color-scheme: dark" in page
    assert "max-width: 40rem" in page
    for column in table_of(RESULTS).columns:
        assert page.count(f'data-column="{column}"') == 2
    assert '<div class="wide"><img src="data:image/png;base64,"' in page


def model(**options):
    options = {"hidden_size": 16, "num_heads": 2, "num_hidden_layers": 2, "vocab_size": 8, "window": 4} | options
    return HQLTForCausalLM(HQLTConfig(**options, intermediate_size=16))


@pytest.mark.parametrize("mixer", ["vector", "scalar", "sum"])
def test_shares_tell_which_memory_spoke(mixer):
    hybrid = model(mixer=mixer)
    tokens = torch.randint(0, 8, (3, 10))
    shares = memory_shares(hybrid, tokens)
    assert shares.fw.shape == shares.gate.shape == (2, 3, 10)
    assert (shares.fw > 0).all()
    assert (shares.fw < 1).all()
    if mixer == "sum":
        assert (shares.gate == 1).all()


def test_a_memory_left_idle_has_no_share():
    hybrid = model(blend="delayed-streaming")
    shares = memory_shares(hybrid, torch.randint(0, 8, (1, 10)))
    assert (shares.fw[..., :4] == 0).all()  # nothing has left the window yet
    assert (shares.fw[..., 4:] > 0).all()


def test_a_model_without_two_memories_is_refused():
    with pytest.raises(ValueError, match="at least one layer that mixes two memories"):
        memory_shares(model(layer_kinds=["kv", "fw"]), torch.zeros(1, 3, dtype=torch.long))
