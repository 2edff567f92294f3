"""A folder has runs of one kind, by one process at a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hqlt.run_folder import COMMANDS, MARKER, kind_of, run_folder


@pytest.mark.parametrize("kind", COMMANDS)
def test_a_new_folder_is_marked_and_can_be_reopened(tmp_path: Path, kind: str) -> None:
    for _ in range(2):
        with run_folder(tmp_path / "run", kind):
            assert kind_of(tmp_path / "run") == kind


def test_a_run_of_another_kind_is_refused_and_not_changed(tmp_path: Path) -> None:
    with run_folder(tmp_path, "language"):
        (tmp_path / "config.json").touch()
    with (
        pytest.raises(ValueError, match=r"expected a run of hqlt rl train, found one of hqlt train"),
        run_folder(tmp_path, "agent"),
    ):
        pytest.fail("entered")
    assert kind_of(tmp_path) == "language"


def test_a_folder_with_other_files_is_refused_and_not_changed(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(ValueError, match="found other files"), run_folder(tmp_path, "study"):
        pytest.fail("entered")
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]


def test_a_folder_is_locked_for_one_process(tmp_path: Path) -> None:
    with (
        run_folder(tmp_path, "study"),
        pytest.raises(ValueError, match="another process"),
        run_folder(tmp_path, "study"),
    ):
        pytest.fail("entered")


@pytest.mark.parametrize("content", ["", "[]", "{}", json.dumps({"kind": "photo"})])
def test_a_damaged_marker_is_reported(tmp_path: Path, content: str) -> None:
    (tmp_path / MARKER).write_text(content)
    with pytest.raises(ValueError, match=MARKER), run_folder(tmp_path, "study"):
        pytest.fail("entered")


def test_the_folder_of_a_run_that_wrote_nothing_is_removed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data"), run_folder(tmp_path / "runs" / "new", "language"):
        raise ValueError("data")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="data"), run_folder(tmp_path / "there", "language"):
        raise ValueError("data")
    assert list(tmp_path.rglob("*")) == [tmp_path / "there"]
