"""The live status line."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from hqlt.train.live import LiveLine, fit_into_width

WORDS = ["loss 1.234 nats/token", "12,345 tokens/s", "12% of peak", "gradient 0.12", "1,234 MiB"]


def test_only_complete_values_are_shown_the_first_ones_first():
    assert fit_into_width(WORDS, 38) == "loss 1.234 nats/token  12,345 tokens/s"
    assert fit_into_width(WORDS, 37) == "loss 1.234 nats/token"
    assert fit_into_width(WORDS, 3) == ""


@pytest.mark.parametrize("width", [40, 60, 80, 100, 200])
def test_the_status_is_one_line_at_any_width(width):
    console = Console(file=io.StringIO(), force_terminal=True, width=width, legacy_windows=False)
    with LiveLine(console, 10_000, 0) as line:
        line.show(123, WORDS)
        shown = console.render_lines(line.bar.get_renderable(), pad=False)
    (only,) = ["".join(segment.text for segment in row).rstrip() for row in shown]
    assert only.startswith("123/10000 ")
    assert len(only) <= width
    assert "…" not in only
    assert all(word in only for word in WORDS) == (width == 200)


def test_a_log_gets_complete_lines():
    file = io.StringIO()
    with LiveLine(Console(file=file, width=40, soft_wrap=True), 10, 0) as line:
        line.show(1, WORDS)
        line.show(2, WORDS, "validation 2.0 bits/byte")
    (only,) = file.getvalue().splitlines()
    assert only.startswith("      2  loss 1.234 nats/token  12,345 tokens/s")
