import io

import pytest
from rich.console import Console

from hqlt.report.table import TOO_SMALL, Table, TableCell, table_of
from tests.report.test_report import RESULTS, result

NAMES = ["model", "parity, accuracy %", "recall, accuracy %", "text, bits/byte", "seconds"]
NUMBERS = ["55.5 (25.0 50.1 100.0)", "12.7", "2.999", "12345"]
WIDTHS = [20, 30, 40, 60, 80, 100, 120]


def printed(table, width):
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=True, color_system=None).print(table.for_terminal())
    return out.getvalue()


@pytest.mark.parametrize("width", WIDTHS)
def test_no_number_is_truncated_on_a_narrow_terminal(width):
    table = Table(NAMES, [[TableCell(name), *map(TableCell, NUMBERS)] for name in ("Delayed-Streaming", "[b]")], "Why.")
    shown = printed(table, width)
    assert all(len(line) <= width for line in shown.splitlines())
    assert "…" not in shown
    for name in ("Delayed-Streaming", "[b]", "Why."):
        assert name in shown
    words = shown.split()
    for number in NUMBERS:
        for part in number.split():
            assert words.count(part) == 2, part


def test_a_wide_terminal_shows_one_line_per_row():
    shown = printed(table_of(RESULTS), 100)
    assert sum("DeltaNet" in line for line in shown.splitlines()) == 1
    assert "50.0 (25.0 50.0 100.0)" in shown


def test_quick_tables_mark_no_best_score():
    table = table_of(RESULTS, quick=True)
    assert not any(cell.best for row in table.rows for cell in row)
    assert table.caption.startswith(TOO_SMALL)
    assert TOO_SMALL not in table_of(RESULTS).caption


def test_sizes_are_shown_for_every_score():
    """The size of the state is a dash if it grows, as in full attention."""
    results = [r._replace(state_bytes=4096 if r.cell.model == "DeltaNet" else None) for r in RESULTS]
    table = table_of(results, sizes=True)
    sizes = ["parameters", "state bytes"]
    assert table.columns == ["model", "parity, accuracy %", *sizes, "text, bits/byte", *sizes, "seconds"]
    assert [[cell.text for cell in row[2:4]] for row in table.rows] == [["1,000", "4,096"], ["1,000", "–"]]
    assert "State bytes: " in table.caption and "Parameters: " not in table.caption


def test_skipped_updates_are_counted():
    assert "updates skipped" not in table_of(RESULTS).columns
    bad = result("DeltaNet", "parity", 0.5, seed=3)
    bad = bad._replace(history=[bad.history[-1]._replace(skipped=1234)])
    table = table_of([*RESULTS, bad])
    assert table.columns[-1] == "updates skipped"
    assert [row[-1].text for row in table.rows] == ["1,234", "0"]
