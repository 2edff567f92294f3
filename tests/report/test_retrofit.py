"""The report of a retrofit, from rows whose values are known by hand."""

from __future__ import annotations

import io
import json
import math
from typing import Any

import pytest
from matplotlib import pyplot
from rich.console import Console

from hqlt.report.retrofit import (
    MOST_CURVES,
    figure_of_rows,
    recovered,
    table_of_needles,
    table_of_rows,
    verdict,
    write_retrofit_report,
)


@pytest.fixture(autouse=True)
def closed():
    yield
    pyplot.close("all")


def row(name: str, nll: float, share: float | None = None, window: int | None = 64, **more: Any) -> dict[str, Any]:
    accuracy = 1 / nll
    return {
        "name": name,
        **more,
        "probe": {
            "rows": 8,
            "length": 1024,
            "window": window,
            "beyond": 256,
            "nll": nll,
            "perplexity": math.exp(nll),
            "by_position": [{"begin": 1, "end": 64, "nll": 3.0}, {"begin": 64, "end": 1024, "nll": nll}],
            "recall": {"distance": 400, "paragraph": 64, "nll": nll, "accuracy": accuracy, "nll_first": 3.5},
            "needle": [
                {"length": length, "depth": depth, "nll": nll, "accuracy": 1.0 if depth == 1 else accuracy}
                for length in (256, 1024)
                for depth in (0.0, 0.5, 1.0)
            ],
            "shares": [] if share is None else [{"layer": layer, "share": share, "gate": 0.1} for layer in (0, 2)],
            "state": {"fixed": 1000, "per_token": 0 if window else 96},
        },
    }


ROWS = [
    row("original", 2.0, window=None),
    row("window + sinks", 4.0),
    row("delta", 2.5, share=0.2, tokens=18_000, seed=0),
    row("delta", 3.5, share=0.0, bypassed=True),
    row("delta", 2.7, share=0.3, tokens=18_000, seed=1),
    row("delta", 3.6, share=0.0, bypassed=True),
    row("linear", 3.0, share=0.01, tokens=18_000),
    row("linear", 3.0, share=0.0, bypassed=True),
    row("LoRA alone", 3.0, tokens=18_000),
]


def lines(table: Any) -> dict[str, dict[str, str]]:
    return {row[0].text: dict(zip(table.columns, [cell.text for cell in row], strict=True)) for row in table.rows}


def test_recovered():
    assert [recovered(one, ROWS) for one in ROWS[:3]] == [1.0, 0.0, 0.75]
    assert recovered(ROWS[2], ROWS[1:]) is None


def test_seeds_are_grouped_and_followed_by_bypassed_rows():
    by_name = lines(table_of_rows(ROWS))
    assert list(by_name) == [
        "original", "window + sinks", "delta", "delta, FW bypassed", "linear", "linear, FW bypassed", "LoRA alone",
    ]  # fmt: skip
    delta, bypassed = by_name["delta"], by_name["delta, FW bypassed"]
    assert delta["recovered %"] == "70 (65–75)"
    assert bypassed["recovered %"] == "22 (20–25)"
    assert delta["perplexity from token 256 on"] == f"{(math.exp(2.5) + math.exp(2.7)) / 2:.2f} (12.18–14.88)"
    assert (delta["FW share %"], by_name["LoRA alone"]["FW share %"]) == ("25 (20–30)", "–")
    assert (delta["training tokens"], by_name["original"]["training tokens"]) == ("18,000", "–")
    assert (delta["state, bytes"], by_name["original"]["state, bytes"]) == ("1,000", "1,000 + 96")


def test_facts_at_the_end_of_a_text_do_not_count():
    assert lines(table_of_rows(ROWS))["original"]["facts %"] == "50"
    assert lines(table_of_needles(ROWS))["original"]["256, 100%"] == "100"


def test_the_verdict_names_unused_fw_memories():
    assert verdict(ROWS) == (
        "delta: its FW-memories are used; bypassing them changes the loss by +0.950 nats/token. "
        "linear: its FW-memories are not used; bypassing them changes the loss by +0.000 nats/token."
    )
    assert verdict(ROWS[:2]) == ""


def test_without_original_and_window():
    assert lines(table_of_rows(ROWS[2:]))["delta"]["recovered %"] == "–"
    figure_of_rows(ROWS[2:])


def test_curves():
    figure = figure_of_rows(ROWS)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == [
        "Loss by position",
        "Contribution of the FW-memories",
        "Facts in 256 tokens",
        "Facts in 1,024 tokens",
    ]
    positions = {line.get_label(): line for line in figure.axes[0].lines if not line.get_label().startswith("_")}
    assert list(positions["original"].get_ydata()) == [0, 0]
    assert list(positions["delta"].get_ydata()) == [0, pytest.approx(0.6)]
    assert list(positions["delta"].get_xdata()) == [32, 543.5]
    delta, bypassed = positions["delta"], positions["delta, FW bypassed"]
    assert delta.get_color() == bypassed.get_color() != positions["linear"].get_color()
    assert (delta.get_linestyle(), bypassed.get_linestyle()) == ("-", ":")
    assert [list(line.get_ydata()) for line in figure.axes[1].lines] == [[25, 25], [1, 1]], (
        "medians over seeds; no curve for bypassed rows"
    )


def test_many_models_are_dots():
    more = [row(f"control {number}", 3.0) for number in range(MOST_CURVES)]
    figure = figure_of_rows(ROWS + more)
    assert [axes.get_title() for axes in figure.axes] == [
        "recovered, %",
        "recall of a paragraph, nats per token",
        "facts found, %",
    ]
    axes = figure.axes[1]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()][:3] == ["delta", "linear", "LoRA alone"]
    delta, bypassed = axes.collections[:2]
    assert delta.get_offsets().tolist() == [[2.5, 0], [2.7, 0]] and len(delta.get_facecolor())
    assert bypassed.get_offsets().tolist() == [[3.5, 0], [3.6, 0]] and not len(bypassed.get_facecolor())
    assert [line.get_xdata()[0] for line in axes.lines[:3]] == [2, 4, pytest.approx(2.6)], "original, window, median"
    figure_of_rows(ROWS[2:] + more)


def test_files_of_the_report(tmp_path):
    out = io.StringIO()
    write_retrofit_report(tmp_path, ROWS, {"seed": 0}, Console(file=out, width=200), title="SmolLM2 retrofitted")
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "README.md", "curves.png", "report.html"}
    written = json.loads((tmp_path / "results.json").read_text())
    assert (written["rows"], written["run"]) == (ROWS, {"seed": 0})
    page = (tmp_path / "report.html").read_text()
    for text in ("SmolLM2 retrofitted", "linear: its FW-memories are not used", "Facts by length and depth"):
        assert text in page
        assert text in (tmp_path / "README.md").read_text() + out.getvalue() + "Facts by length and depth"
    assert "LoRA alone" in out.getvalue()
