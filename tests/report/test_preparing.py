import io

import pytest
from rich.console import Console

from hqlt.data import PrepareProgress
from hqlt.report.preparing import PreparingDisplay
from hqlt.train import live


def progress(tokens, done, kept=0):
    return PrepareProgress(documents=tokens // 10, tokens=tokens, done=done, kept=kept)


def test_a_line_has_speed_and_remaining_time():
    line = PreparingDisplay.line_of(progress(3000, 0.75), progress(1000, 0.25), seconds=2)
    assert line == "300 documents  3,000 tokens  1,000 tokens/s  75 %  about 0:01 left"
    assert PreparingDisplay.line_of(progress(3000, None), progress(0, None), 2).endswith("1,500 tokens/s")


@pytest.mark.parametrize("terminal", [True, False])
def test_a_log_gets_lines_and_a_terminal_a_transient_one(terminal, monkeypatch):
    monkeypatch.setattr(live, "LOG_SECONDS", -1)
    out = io.StringIO()
    with PreparingDisplay(Console(file=out, force_terminal=terminal, highlight=False)) as display:
        assert not display.has_started
        for tokens in (100, 200, 300):
            display.on_progress(progress(tokens, None, kept=100))
    assert display.has_started
    assert display.kept == 100
    printed = out.getvalue()
    assert "resuming after 100 tokens of an earlier run" in printed
    assert printed.count("30 documents  300 tokens") == 1
    assert ("\x1b[2K" in printed) == terminal
