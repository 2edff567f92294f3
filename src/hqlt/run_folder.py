"""The folder of a run: one process at a time works in it, and a run of one kind never writes into another's."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from hqlt.disk import UNFINISHED, exclusive_folder, write_atomic

MARKER = "run.json"
"""Says which kind of run a folder belongs to."""
COMMANDS = {
    "language": "hqlt train",
    "retrofit": "hqlt retrofit",
    "agent": "hqlt rl train",
    "study": "hqlt demo or hqlt reproduce",
}
"""By kind of run: the commands that make such folders."""


@contextlib.contextmanager
def run_folder(folder: Path, kind: str) -> Iterator[None]:
    """Make the folder, mark it as a run of this kind, and lock it for as long as the context lasts.

    kind: one of COMMANDS. Raises ValueError, and leaves the folder as it was, where another process works in it, where
    it is a run of another kind, and where it holds files but no run. A new run that ends before it has written anything
    leaves no folder behind.
    """
    with exclusive_folder(folder):
        found = kind_of(folder)
        if found is None:
            if any(not path.name.endswith(UNFINISHED) for path in folder.iterdir()):
                raise ValueError(
                    f"{folder}: expected a new or empty folder, or one that {COMMANDS[kind]} made, found other files "
                    f"in it; give another folder"
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
    """The kind of run that a folder belongs to; None where no run has marked it.

    Raises ValueError for a marker that cannot be read or names an unknown kind.
    """
    try:
        found = json.loads((folder / MARKER).read_bytes())["kind"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / MARKER}: expected JSON with the kind of a run, got {error}") from error
    if found not in COMMANDS:
        raise ValueError(f"{folder / MARKER}: expected one of {', '.join(COMMANDS)}, got {found!r}")
    return str(found)
