import dataclasses
import json
import os
import signal
from pathlib import Path

import pytest

from hqlt.model import HQLTForCausalLM
from hqlt.train import Budget
from hqlt.train.grid import Event, Result, load_result, run_grid
from hqlt.train.task_cell import TaskCell

CELL = TaskCell(
    model="Synchronous",
    config={"hidden_size": 16, "num_heads": 2, "num_hidden_layers": 1, "window": 4, "intermediate_size": 16},
    task="parity",
    task_options={"train_lengths": [3, 6], "test_lengths": [6, 12]},
    budget=Budget(steps=4, batch_size=4, validations=2, validation_rows=8, test_rows=8),
)


def others(**changes):
    return dataclasses.replace(CELL, **changes)


def test_a_grid_runs_in_parallel_and_reuses_finished_cells(tmp_path):
    cells = [CELL, others(seed=1)]
    events = []
    first = run_grid(cells, tmp_path, 2, events.append)
    assert [result.cell for result in first] == cells
    assert sum(isinstance(event, Event) for event in events) == 8
    assert HQLTForCausalLM.from_pretrained(tmp_path / "models" / CELL.name).num_parameters() == first[0].parameters

    more = []
    again = run_grid([*cells, others(seed=2)], tmp_path, 2, more.append)
    assert {t.cell.seed for t in more if isinstance(t, Event)} == {2}
    assert [result.fit.test.value for result in again[:2]] == [result.fit.test.value for result in first]
    assert again[0].history[0]._asdict() == first[0].history[0]._asdict()


def test_a_result_of_an_earlier_version_with_fewer_settings_is_reused(tmp_path):
    run_grid([CELL], tmp_path, 1, lambda event: None)
    place = tmp_path / "cells" / f"{CELL.name}.json"
    saved = json.loads(place.read_text())
    del saved["cell"]["switched"], saved["cell"]["trained_as"]
    place.write_text(json.dumps(saved))
    assert load_result(tmp_path, CELL) is not None
    with pytest.raises(ValueError, match="has the result of a cell with other settings"):
        load_result(tmp_path, others(trained_as="another", model=CELL.model))


def test_a_result_has_the_size_of_the_state(tmp_path):
    """Two 8 × 8 matrices, three KV entries and the position; full attention is unbounded."""
    grows = others(model="Transformer", config={**CELL.config, "layer_kinds": ["kv"]})
    first, second = run_grid([CELL, grows], tmp_path, 2, lambda event: None)
    assert first.state_bytes == 4 * (2 * 8 * 8 + 3 * 2 * 16) + 8
    assert second.state_bytes is None
    for result in (first, second):
        assert load_result(tmp_path, result.cell).state_bytes == result.state_bytes


def test_a_result_does_not_depend_on_other_cells(tmp_path):
    alone = run_grid([others(seed=3)], tmp_path / "alone", 1, lambda event: None)
    together = run_grid([CELL, others(seed=3)], tmp_path / "together", 2, lambda event: None)
    assert alone[0].fit.test.value == together[1].fit.test.value
    assert [p.loss for p in alone[0].history] == [p.loss for p in together[1].history]


def test_the_cell_of_a_killed_worker_is_run_again(tmp_path):
    killed = []

    def kill_the_first(event):
        if isinstance(event, Event) and not killed:
            (worker,) = [int(pid) for pid in os.listdir("/proc") if pid.isdigit() and is_worker(int(pid))]
            os.kill(worker, signal.SIGKILL)
            killed.append(worker)

    if not os.path.isdir("/proc"):
        pytest.skip("needs /proc to find the worker")
    cell = others(budget=Budget(steps=400, batch_size=4, validations=1, validation_rows=8, test_rows=8))
    (result,) = run_grid([cell], tmp_path, 1, kill_the_first)
    assert killed
    assert isinstance(result, Result)


def is_worker(pid: int) -> bool:
    """Whether a process is a child of the fork server, which forks one process per cell."""
    try:
        parent = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
        return "forkserver" in Path(f"/proc/{parent}/cmdline").read_text() and is_child_of(parent, os.getpid())
    except OSError:
        return False


def is_child_of(pid: int, parent: int) -> bool:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1]) == parent


def test_a_cell_that_fails_is_reported_with_the_reason(tmp_path):
    bad = others(task_options={"train_lengths": [3, 6], "test_lengths": [6]})
    with pytest.raises(RuntimeError, match=rf"1 of 2 cells failed 2 times:\n{bad.name}[^$]*test_lengths: expected"):
        run_grid([bad, others(seed=1)], tmp_path, 2, lambda event: None)
    assert (tmp_path / "cells" / f"{others(seed=1).name}.json").exists()


def test_fewer_than_one_worker_is_refused(tmp_path):
    with pytest.raises(ValueError, match="workers: expected at least 1, got -1"):
        run_grid([CELL], tmp_path, -1, lambda event: None)


def test_results_of_other_settings_in_the_folder_are_refused(tmp_path):
    run_grid([CELL], tmp_path, 1, lambda event: None)
    changed = others(budget=dataclasses.replace(CELL.budget, steps=5))
    with pytest.raises(ValueError, match="other settings"):
        run_grid([changed], tmp_path, 1, lambda event: None)
