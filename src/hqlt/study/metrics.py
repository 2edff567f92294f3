"""metrics.jsonl of a study, with exactly one line for each recorded step of a cell."""

from __future__ import annotations

import json
from pathlib import Path

from hqlt.disk import write_atomic
from hqlt.train.fit import Progress
from hqlt.train.grid import Event, Result


class StudyMetrics:
    """Writes lines while cells are trained.

    If a cell is restarted, its earlier lines are removed. A finished cell has the lines of its whole history, including
    those of an earlier run.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cells: dict[str, list[Progress]] = {}
        write_atomic(path, b"")
        self.file = path.open("a", buffering=1)

    def on_event(self, event: Event | Result) -> None:
        name = event.cell.name
        if isinstance(event, Result):
            self.cells[name] = event.history
            self._rewrite()
        elif event.in_history:
            history = self.cells.setdefault(name, [])
            if history and history[-1].step >= event.progress.step:
                history.clear()
                self._rewrite()
            history.append(event.progress)
            self.file.write(to_line(name, event.progress))

    def close(self) -> None:
        self.file.close()

    def _rewrite(self) -> None:
        self.close()
        lines = [to_line(name, progress) for name, history in self.cells.items() for progress in history]
        write_atomic(self.path, "".join(lines).encode())
        self.file = self.path.open("a", buffering=1)


def to_line(cell: str, progress: Progress) -> str:
    return json.dumps({"cell": cell, **progress._asdict()}) + "\n"
