import dataclasses
import io
import threading

import pytest
from rich.console import Console

from hqlt.evaluate import Score
from hqlt.report.live import GridDisplay
from hqlt.train.fit import Budget, Fit, Progress
from hqlt.train.grid import Event, Result
from hqlt.train.task_cell import TaskCell

CELL = TaskCell(
    model="Delayed-Streaming", config={}, task="parity", task_options={}, budget=Budget(steps=100, batch_size=1)
)
CELLS = [dataclasses.replace(CELL, model=model) for model in ("Transformer", "Delayed-Streaming", "Synchronous")]
EVENT = Event(CELL, Progress(10, 0.693, 12.34, 5.0, 12_345, 0.125))
WIDTHS = [40, 60, 80, 100, 120]


def result(cell=CELL, value=0.5):
    score = Score("accuracy", value, [])
    return Result(cell, 1000, 12.0, Fit(2, score, score), [])


def display_on(width, *, terminal=True, cells=CELLS):
    return GridDisplay(cells, Console(file=io.StringIO(), width=width, force_terminal=terminal, color_system=None))


def drawn(display):
    with display.console.capture() as capture:
        display.console.print(display._render())
    return capture.get()


def test_events_may_arrive_while_another_thread_draws():
    """rich draws in a thread of its own."""
    display, failed, done = display_on(80), [], threading.Event()

    def draw():
        while not done.is_set():
            try:
                display._render()
            except RuntimeError as error:
                failed.append(error)
                return

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        for _ in range(300):
            for seed in range(10):
                display.on_event(EVENT._replace(cell=dataclasses.replace(CELL, seed=seed)))
            for seed in range(10):
                display.on_event(result(dataclasses.replace(CELL, seed=seed)))
    finally:
        done.set()
        thread.join()
    assert not failed


@pytest.mark.parametrize("width", WIDTHS)
def test_a_running_cell_is_never_truncated(width):
    display = display_on(width)
    display.on_event(EVENT)
    display.on_event(EVENT._replace(progress=EVENT.progress._replace(step=11, validation=None)))
    shown = drawn(display)
    assert len(shown.splitlines()) == 3
    heading, row, bar = (line.split() for line in shown.splitlines())
    assert {"model", "step"} <= set(heading)
    assert {"Delayed-Streaming", "11/100"} <= set(row)
    assert bar[0] == "cells"
    assert bar[-1] == "left"
    if width >= 80:
        assert "0.693 nats" in shown
    if width >= 120:
        assert "12.5 % accuracy" in shown, "the latest score is still shown"


@pytest.mark.parametrize("width", WIDTHS)
def test_the_line_of_a_finished_cell_wraps_between_words(width):
    display = display_on(width)
    display.on_event(result())
    words = display.console.file.getvalue().split()
    assert " ".join(words) == "parity Delayed-Streaming 0 50.0 % accuracy 12 s from an earlier run"
    assert max(map(len, display.console.file.getvalue().splitlines())) <= width


def test_a_log_has_one_line_per_cell_with_aligned_columns():
    display = display_on(40, terminal=False)
    with display:
        for cell in CELLS:
            display.on_event(Event(cell, EVENT.progress))
            display.on_event(result(cell))
    lines = display.console.file.getvalue().splitlines()
    assert len(lines) == 3
    assert len({line.index("50.0 %") for line in lines}) == 1


def test_skipped_updates_are_shown_if_there_are_any():
    display = display_on(160)
    display.on_event(EVENT)
    assert "skipped" not in drawn(display)
    display.on_event(EVENT._replace(progress=EVENT.progress._replace(skipped=7)))
    assert "skipped" in drawn(display)
