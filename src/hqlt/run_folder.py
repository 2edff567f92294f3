"""Run folders: locked for one process at a time, and marked with the kind of run that may write to them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from hqlt.disk import UNFINISHED, exclusive_folder, write_atomic

MARKER = "run.json"
"""The file that stores the kind of run."""
COMMANDS = {
    "language": "hqlt train",
    "retrofit": "hqlt retrofit",
    "agent": "hqlt rl train",
    "study": "hqlt demo or hqlt reproduce",
}
"""The commands that create run folders, by kind of run."""


@contextlib.contextmanager
def run_folder(folder: Path, kind: str) -> Iterator[None]:
    """Create the folder, mark it as a run of this kind, and lock it within the context.

    kind: one of COMMANDS. Raises ValueError, without changing the folder, if another process has locked it, if it is a
    run of another kind, or if it has files but is not a run. If a new run ends before it has written anything, the
    folder is removed.
    """
    with exclusive_folder(folder):
        found = kind_of(folder)
        if found is None:
            if any(not path.name.endswith(UNFINISHED) for path in folder.iterdir()):
                raise ValueError(
                    f"{folder}: expected a new or empty folder, or one created by {COMMANDS[kind]}, found other "
                    f"files; give another folder"
                )
            write_atomic(folder / MARKER, json.dumps({"kind": kind}).encode())
        elif found != kind:
            raise ValueError(
                f"{folder}: expected a run of {COMMANDS[kind]}, found one of {COMMANDS[found]}; give another folder"
            )
        try:
            yield
        finally:
            if [path.name for path in folder.iterdir()] == [MARKER]:
                (folder / MARKER).unlink()


def kind_of(folder: Path) -> str | None:
    """The kind of run that a folder belongs to; None: it is not a run.

    Raises ValueError if the marker cannot be read or names an unknown kind.
    """
    try:
        found = json.loads((folder / MARKER).read_bytes())["kind"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / MARKER}: expected JSON with the kind of run, got {error}") from error
    if found not in COMMANDS:
        raise ValueError(f"{folder / MARKER}: expected one of {', '.join(COMMANDS)}, got {found!r}")
    return str(found)
