"""metrics.jsonl of a study: a line for each step of a cell that is kept, and one alone."""

from __future__ import annotations

import json
from pathlib import Path

from hqlt.disk import write_atomic
from hqlt.train.fit import Progress
from hqlt.train.grid import Event, Result


class StudyMetrics:
    """Lines come as cells are trained. One that is tried again begins anew; one that ended has its whole history."""

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
            told = self.cells.setdefault(name, [])
            if told and told[-1].step >= event.progress.step:
                told.clear()
                self._rewrite()
            told.append(event.progress)
            self.file.write(line(name, event.progress))

    def close(self) -> None:
        self.file.close()

    def _rewrite(self) -> None:
        self.close()
        write_atomic(self.path, "".join(line(name, one) for name, told in self.cells.items() for one in told).encode())
        self.file = self.path.open("a", buffering=1)


def line(cell: str, progress: Progress) -> str:
    return json.dumps({"cell": cell, **progress._asdict()}) + "\n"
