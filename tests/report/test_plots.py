import dataclasses
import json
import runpy
import sys
from pathlib import Path

import pytest
from matplotlib import pyplot
from PIL import Image

from hqlt.report.plots import MAX_MODELS, figure_of, group_models, passes_through, save, styles_of
from hqlt.report.table import table_of
from hqlt.train.grid import as_json
from tests.report.test_report import RESULTS, result

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def closed():
    yield
    pyplot.close("all")


def panels_of(results):
    figure = figure_of(results)
    assert all(axes.lines for axes in figure.axes), "no panel is empty"
    return figure.axes


def with_experiment(label, results, **changes):
    return [r._replace(cell=dataclasses.replace(r.cell, experiment=label, **changes)) for r in results]


def style_of(line):
    return line.get_color(), line.get_linestyle()


def medians(axes):
    """The thick lines by model."""
    return {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}


def test_seeds_and_their_median_are_drawn(tmp_path):
    figure = figure_of(RESULTS)
    assert [len(axes.lines) for axes in figure.axes] == [3 + 1 + 1 + 1, 2] * 2, "the last is chance"
    assert list(medians(figure.axes[0])["DeltaNet"].get_ydata()) == [0.5, 0.5]
    assert save(figure, tmp_path / "curves.png").count("<svg") == 2 + 4
    with Image.open(tmp_path / "curves.png") as image:
        assert image.mode == "P"


def test_many_experiments_fit_and_every_model_has_its_own_color_and_marker():
    results = [
        changed
        for j in range(6)
        for changed in with_experiment(f"parity {j}", [result(f"model {i}", "parity", i / 10) for i in range(7)])
    ]
    panels = panels_of(results)
    assert len(panels) == 12
    for axes in panels:
        lines = medians(axes).values()
        assert len({line.get_marker() for line in lines}) == len({style_of(line) for line in lines}) == 7
    assert table_of(results).columns == ["model", *(f"parity {j}, accuracy %" for j in range(6)), "seconds"]


def test_coinciding_curves_are_visible_around_each_other():
    """They also alternate in drawing markers."""
    axes = panels_of([result(model, "parity", value) for model, value in (("A", 1.0), ("B", 0.5), ("C", 1.0))])[0]
    lines = medians(axes)
    assert [lines[model].get_markevery() for model in "ABC"] == [[0], [0, 1], [1]]
    (behind,) = [line for line in axes.lines if line.get_linewidth() > lines["A"].get_linewidth()]
    assert behind.get_color() == lines["A"].get_color() != lines["C"].get_color()
    assert behind.get_zorder() < lines["C"].get_zorder() and list(behind.get_ydata()) == [1, 1]


def test_of_many_coinciding_curves_the_first_is_the_widest():
    axes = panels_of([result(f"model {i}", "parity", 1.0) for i in range(MAX_MODELS)])[0]
    lines = list(medians(axes).values())
    behind = [line for line in axes.lines if line.get_linewidth() > lines[0].get_linewidth()]
    widths = [line.get_linewidth() for line in behind]
    assert len(widths) == MAX_MODELS - 1 and widths == sorted(widths, reverse=True) and widths[0] <= 10
    low, high = axes.get_ylim()
    assert 72 * axes.get_position().height * axes.figure.get_figheight() * (high - 1) / (high - low) > widths[0] / 2


def test_chance_is_marked_where_it_is_known():
    parity, text, *_ = panels_of([result("A", "parity", 0.5), result("A", "text", 2.0)])
    assert [[note.get_text() for note in axes.texts] for axes in (parity, text)] == [["chance"], []]
    assert parity.get_ylabel() == "accuracy above chance, %" and parity.yaxis.get_major_formatter()(0.5) == "50"
    assert text.get_ylabel() == "bits per byte"


def test_nothing_is_clipped():
    for axes in panels_of([result("A", "parity", -0.4), result("B", "parity", 1.0)]):
        low, high = axes.get_ylim()
        assert low < -0.4
        assert high > 1


def test_more_models_than_can_be_told_apart_take_columns_by_family():
    names = [*(f"Synchronous, window {i}" for i in range(MAX_MODELS)), "DeltaNet", "Transformer", "DeltaNet, RoPE"]
    assert group_models(names[:MAX_MODELS]) == [names[:MAX_MODELS]]
    assert group_models(names) == [names[:MAX_MODELS], ["DeltaNet", "DeltaNet, RoPE", "Transformer"]]
    assert [len(group) for group in group_models([f"A, {i}" for i in range(MAX_MODELS + 1)])] == [MAX_MODELS, 1]
    panels = panels_of([result(name, "parity", 0.5) for name in names])
    assert [len(medians(axes)) for axes in panels] == [MAX_MODELS, 3, MAX_MODELS, 3]
    for group in group_models(names):
        assert len({(style["color"], style["linestyle"]) for style in styles_of(group).values()}) == len(group)
    assert [axes.get_legend() is not None for axes in panels] == [False, False, True, True]


def test_families_stand_side_by_side_an_experiment_a_row():
    names = [f"{family}, {i}" for family in ("A", "B", "C") for i in range(MAX_MODELS)]
    panels = panels_of([r for j in range(2) for r in with_experiment(f"e{j}", [result(n, "text", 2.0) for n in names])])
    titles = [axes.get_title() for axes in panels if axes.get_title()]
    assert titles == [f"e{j}, {family}" for j in range(2) for family in "ABC"]
    left = [
        [round(axes.get_position().x0, 3) for axes in panels if axes.get_title().startswith(f"e{j}")] for j in (0, 1)
    ]
    assert left[0] == left[1] == sorted(set(left[0]))


def test_an_experiment_without_a_coordinate_has_one_panel(monkeypatch):
    """Agents have no coordinate unless they are tested at several values of an option."""
    cell = type(RESULTS[0].cell)
    monkeypatch.setattr(cell, "coordinate_name", property(lambda self: None if self.experiment == "bare" else "length"))
    results = [result("A", "parity", 0.5), result("B", "parity", 0.7)]
    assert len(panels_of([*results, *with_experiment("bare", results)])) == 3
    assert len(panels_of(with_experiment("bare", results))) == 1


@pytest.mark.parametrize(("end", "ticks"), [(1_200_000, ["0", "50k", "1,200k"]), (5000, ["0"])])
def test_tick_labels_of_an_axis_have_one_format(end, ticks):
    (bottom,) = panels_of([result("A", "parity", 0.5)])[1:]
    bottom.set_xlim(0, end)
    shown = bottom.xaxis.get_major_formatter()
    assert [shown(value) for value in (0, 50_000, 1_200_000)][: len(ticks)] == ticks


def test_curves_pass_through_points_that_are_close():
    assert passes_through([(0, 1.0), (1, 1.0)], [(0, 1.0), (1, 0.995)])
    assert not passes_through([(0, 1.0), (1, 1.0)], [(0, 1.0), (1, 0.9)])
    assert not passes_through([(0, 1.0)], [(1, 1.0)])


def test_a_model_has_the_same_color_in_all_figures():
    names = ["Transformer", "DeltaNet", "Delayed-Streaming", "Delayed-Chunk", "Synchronous", "LSTM"]
    alone = {name: styles_of([name])[name]["color"] for name in names}
    assert len(set(alone.values())) == 6
    together = styles_of(["Synchronous, surprise", *reversed(names), "DeltaNet, β ≤ 1"])
    assert {name: together[name]["color"] for name in names} == alone
    assert styles_of(["Transformer, window 8"])["Transformer, window 8"]["color"] == alone["Transformer"]
    assert styles_of(["DeltaNet, β ≤ 1", "DeltaNet, β ≤ 2"])["DeltaNet, β ≤ 2"]["color"] == alone["DeltaNet"]


def test_curves_can_be_drawn_from_committed_results(tmp_path, monkeypatch):
    kept = json.loads(json.dumps([as_json(r) for r in RESULTS]))
    (tmp_path / "results.json").write_text(json.dumps(kept))
    monkeypatch.setattr(sys, "argv", ["results.py", str(tmp_path / "results.json")])
    made = runpy.run_path(str(ROOT / "docs" / "figures" / "results.py"), run_name="__main__")
    with Image.open(tmp_path / "curves.png") as image:
        assert image.mode == "P"
    assert json.loads(json.dumps([as_json(made["result"](one)) for one in kept])) == kept
    (agents,) = (ROOT / "results" / "visual-match").glob("*.json")
    assert made["result"](json.loads(agents.read_text())[0]).cell.coordinate_name == "distractor"
