import dataclasses
import json

import pytest

from hqlt.study.metrics import StudyMetrics
from hqlt.train.fit import Budget, Progress
from hqlt.train.grid import Event
from hqlt.train.task_cell import TaskCell

CELL = TaskCell(model="A", config={}, task="parity", task_options={}, budget=Budget(steps=9, batch_size=1))
OTHER = dataclasses.replace(CELL, model="B")


def write(path, *steps):
    metrics = StudyMetrics(path)
    for cell, step in steps:
        metrics.write(Event(cell, Progress(step, 1.0, 1.0, 1.0, step, None)))
    metrics.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [(line["cell"], line["step"]) for line in lines]


def test_no_step_stands_in_the_file_twice(tmp_path):
    """Neither of a cell that starts anew in a later start, nor of one that is tried again in the same."""
    a, b = CELL.name, OTHER.name
    assert write(tmp_path / "m", (CELL, 1), (OTHER, 1), (CELL, 2)) == [(a, 1), (b, 1), (a, 2)]
    assert write(tmp_path / "m", (CELL, 1)) == [(b, 1), (a, 1)]
    assert write(tmp_path / "m", (CELL, 2), (CELL, 3), (CELL, 2)) == [(b, 1), (a, 1), (a, 2)]
    assert write(tmp_path / "m", (OTHER, 5)) == [(b, 1), (a, 1), (a, 2), (b, 5)], "resumed from a checkpoint"


def test_a_line_cut_by_a_kill_is_dropped_and_another_that_cannot_be_read_is_named(tmp_path):
    write(tmp_path / "m", (CELL, 1))
    whole = (tmp_path / "m").read_text()
    (tmp_path / "m").write_text(whole + whole[:10])
    assert write(tmp_path / "m") == [(CELL.name, 1)]
    (tmp_path / "m").write_text(whole + "{}\n")
    with pytest.raises(ValueError, match="m, line 2: expected JSON with a cell and a step, got 'cell'; remove the"):
        StudyMetrics(tmp_path / "m")
