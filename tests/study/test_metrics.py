import dataclasses
import json

import pytest

from hqlt.evaluate import Score
from hqlt.study.metrics import StudyMetrics
from hqlt.train.fit import Budget, Fit, Progress
from hqlt.train.grid import Event, Result
from hqlt.train.task_cell import TaskCell

CELL = TaskCell(model="A", config={}, task="parity", task_options={}, budget=Budget(steps=9, batch_size=1))
OTHER = dataclasses.replace(CELL, model="B")
A, B = CELL.name, OTHER.name


def progress(step):
    return Progress(step, 1.0, 1.0, 1.0, step, None)


@pytest.fixture
def metrics(tmp_path):
    (tmp_path / "m").write_text("left by an earlier run, truncated by a ki")
    metrics = StudyMetrics(tmp_path / "m")
    yield metrics
    metrics.close()


def lines(metrics):
    return [(line["cell"], line["step"]) for line in map(json.loads, metrics.path.read_text().splitlines())]


def test_lines_are_written_while_cells_are_trained(metrics):
    for cell, step in ((CELL, 1), (OTHER, 1), (CELL, 2)):
        metrics.on_event(Event(cell, progress(step)))
    assert lines(metrics) == [(A, 1), (B, 1), (A, 2)]


def test_a_restarted_cell_loses_its_earlier_lines(metrics):
    for cell, step in ((CELL, 1), (OTHER, 1), (CELL, 2), (CELL, 1)):
        metrics.on_event(Event(cell, progress(step)))
    assert lines(metrics) == [(B, 1), (A, 1)]


def test_a_finished_cell_has_its_whole_history(metrics):
    """The history includes steps from before the study was killed and resumed."""
    score = Score("accuracy", 1.0, [])
    metrics.on_event(Event(CELL, progress(3)))
    metrics.on_event(Result(CELL, 1, 1.0, Fit(3, score, score), [progress(step) for step in (1, 2, 3)]))
    metrics.on_event(Event(OTHER, progress(1)))
    assert lines(metrics) == [(A, 1), (A, 2), (A, 3), (B, 1)]
