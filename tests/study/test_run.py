"""Studies in processes of their own that are stopped or killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

COMMON = {"hidden_size": 16, "num_heads": 2, "num_hidden_layers": 1, "window": 4}
BUDGET = {"batch_size": 8, "validations": 1, "validation_rows": 8, "test_rows": 8}
STUDY = {
    "title": "Two cells",
    "introduction": "A short and a long one.",
    "models": {"Synchronous": {}},
    "experiments": {
        "short": {"task": "parity", "common": COMMON, "budget": BUDGET | {"steps": 2}},
        "long": {"task": "parity", "common": COMMON, "budget": BUDGET | {"steps": 1_000_000}},
    },
}
MARK = "HQLT_TEST_OF_STOPPING"


@pytest.fixture
def study(tmp_path):
    """A running study in its own process group; its short cell is finished, its long cell still runs."""
    if not os.path.isdir("/proc"):
        pytest.skip("needs /proc to find the workers")
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(STUDY))
    command = [sys.executable, "-m", "hqlt", "reproduce", "mine.yaml", "--workers=2", "--folder=run"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            command,
            cwd=tmp_path,
            stdout=log,
            stderr=log,
            env={**os.environ, MARK: str(tmp_path)},
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 120
        while not list((tmp_path / "run").glob("cells/short*.json")) or len(processes(tmp_path)) < 3:
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield process
    finally:
        process.kill()
        process.wait()


def processes(folder: Path) -> list[int]:
    """Process ids of the study in this folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={folder}".encode() in (path / "environ").read_bytes().split(b"\0"):
                found.append(int(path.name))
        except OSError:  # it has just ended, or belongs to another user
            pass
    return found


def all_gone(folder: Path) -> bool:
    deadline = time.monotonic() + 10
    while processes(folder) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not processes(folder)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["Ctrl-C", "SIGTERM"])
def test_the_first_signal_writes_the_report_of_finished_cells(study, number, status, tmp_path):
    send = os.killpg if number == signal.SIGINT else os.kill  # a terminal sends Ctrl-C to the whole process group
    send(study.pid, number)
    assert study.wait(timeout=60) == status
    assert all_gone(tmp_path)
    log = (tmp_path / "log").read_text()
    assert "stopped with 1 of 2 cells finished; resume with: hqlt reproduce mine.yaml" in log
    assert "Traceback" not in log
    assert "(1 of 2 runs)" in (tmp_path / "run" / "README.md").read_text()
    assert (tmp_path / "run" / "report.html").exists()


def test_the_second_signal_stops_at_once(study, tmp_path):
    running = len(processes(tmp_path))
    os.killpg(study.pid, signal.SIGINT)
    while len(processes(tmp_path)) >= running:  # wait until a worker is gone and the report begins
        pass
    os.killpg(study.pid, signal.SIGINT)
    assert study.wait(timeout=20) == 130
    assert all_gone(tmp_path)
    log = (tmp_path / "log").read_text()
    assert "Traceback" not in log
    assert "resume with" not in log


def test_workers_do_not_outlive_a_process_that_is_killed(study, tmp_path):
    assert len(processes(tmp_path)) >= 3
    study.kill()
    study.wait()
    assert all_gone(tmp_path)
