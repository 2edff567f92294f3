import dataclasses

import pytest
from matplotlib import pyplot
from PIL import Image

from hqlt.report.plots import MANY, coincide, figure_of, grouped, save, styles_of
from hqlt.report.table import table_of
from tests.report.test_report import RESULTS, result


@pytest.fixture(autouse=True)
def closed():
    yield
    pyplot.close("all")


def panels_of(results):
    figure = figure_of(results)
    assert all(axes.lines for axes in figure.axes), "no panel is empty"
    return figure.axes


def of_experiment(label, results, **changes):
    return [r._replace(cell=dataclasses.replace(r.cell, experiment=label, **changes)) for r in results]


def medians(axes):
    """The thick lines, by model."""
    return {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}


def test_every_seed_is_drawn_and_their_median(tmp_path):
    figure = figure_of(RESULTS)
    assert [len(axes.lines) for axes in figure.axes] == [3 + 1 + 1, 2] * 2
    assert list(figure.axes[0].lines[3].get_ydata()) == [0.5, 0.5]
    url = save(figure, tmp_path / "curves.png")
    assert url.startswith("data:image/png;base64,")
    with Image.open(tmp_path / "curves.png") as image:
        assert image.mode == "P"


def test_many_experiments_have_room_and_models_colours_and_markers_of_their_own():
    results = [
        changed
        for j in range(6)
        for changed in of_experiment(f"parity {j}", [result(f"model {i}", "parity", i / 10) for i in range(7)])
    ]
    panels = panels_of(results)
    assert len(panels) == 12
    for axes in panels:
        assert len({line.get_color() for line in axes.lines}) == len({line.get_marker() for line in axes.lines}) == 7
    assert table_of(results).columns == ["model", *(f"parity {j}, accuracy %" for j in range(6)), "seconds"]


def test_curves_that_coincide_take_turns():
    """So that each colour is in sight: their dashes and markers do not overlap."""
    axes = panels_of([result(model, "parity", value) for model, value in (("A", 1.0), ("B", 0.5), ("C", 1.0))])[0]
    lines = medians(axes)
    assert lines["B"].get_linestyle() == "-"
    assert [lines[model].get_markevery() for model in "ABC"] == [(0, 2), (0, 1), (1, 2)]
    patterns = [lines[model]._unscaled_dash_pattern for model in "AC"]
    (first, (dash, gap)), (second, same) = patterns
    assert same == (dash, gap)
    assert dash <= gap
    assert abs(first - second) == dash


def test_nothing_is_clipped():
    for axes in panels_of([result("A", "parity", -0.4), result("B", "parity", 1.0)]):
        low, high = axes.get_ylim()
        assert low < -0.4
        assert high > 1


def test_more_models_than_can_be_told_apart_take_columns_by_family():
    names = [*(f"Synchronous, window {i}" for i in range(MANY)), "DeltaNet", "Transformer", "DeltaNet, RoPE"]
    assert grouped(names[:MANY]) == [names[:MANY]]
    assert grouped(names) == [names[:MANY], ["DeltaNet", "DeltaNet, RoPE", "Transformer"]]
    assert [len(group) for group in grouped([f"A, {i}" for i in range(MANY + 1)])] == [MANY, 1]
    panels = panels_of([result(name, "parity", 0.5) for name in names])
    assert [len(medians(axes)) for axes in panels] == [MANY, 3, MANY, 3]
    for group in grouped(names):
        assert len({style["color"] for style in styles_of(group).values()}) == len(group)
    assert [axes.get_legend() is not None for axes in panels] == [False, False, True, True]


def test_families_stand_side_by_side_an_experiment_a_row():
    names = [f"{family}, {i}" for family in ("A", "B", "C") for i in range(MANY)]
    panels = panels_of([r for j in range(2) for r in of_experiment(f"e{j}", [result(n, "text", 2.0) for n in names])])
    titles = [axes.get_title() for axes in panels if axes.get_title()]
    assert titles == [f"e{j}, {family}" for j in range(2) for family in "ABC"]
    left = [
        [round(axes.get_position().x0, 3) for axes in panels if axes.get_title().startswith(f"e{j}")] for j in (0, 1)
    ]
    assert left[0] == left[1] == sorted(set(left[0]))


def test_an_experiment_without_a_coordinate_has_one_panel(monkeypatch):
    """As agents have that are not tested along anything."""
    cell = type(RESULTS[0].cell)
    monkeypatch.setattr(cell, "coordinate_name", property(lambda self: None if self.experiment == "bare" else "length"))
    results = [result("A", "parity", 0.5), result("B", "parity", 0.7)]
    assert len(panels_of([*results, *of_experiment("bare", results)])) == 3
    assert len(panels_of(of_experiment("bare", results))) == 1


def test_large_numbers_have_one_format():
    (bottom,) = panels_of([result("A", "parity", 0.5)])[1:]
    assert [bottom.xaxis.get_major_formatter()(value) for value in (200_000, 1_200_000, 50)] == ["200k", "1.2M", "50"]


def test_curves_on_other_points_do_not_coincide():
    assert coincide([(0, 1.0), (1, 1.0)], [(0, 1.0), (1, 0.995)])
    assert not coincide([(0, 1.0), (1, 1.0)], [(0, 1.0), (1, 0.9)])
    assert not coincide([(0, 1.0)], [(1, 1.0)])
