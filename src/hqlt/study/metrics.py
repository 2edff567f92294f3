"""metrics.jsonl of a study: a line for each step of a cell that is kept, and one alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TextIO

from hqlt.disk import write_whole
from hqlt.train.grid import Event


class StudyMetrics:
    """A cell that starts again takes back its lines from there on, so that no step stands in the file twice.

    Raises ValueError where a line of an earlier start cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[tuple[str, int, str]] = []
        """Cell, step and text."""
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        for i, line in enumerate(lines, start=1):
            if line.endswith("\n"):  # the last one may have been cut by a kill
                self.lines.append(self._read(line, i))
        self.reached = {cell: step for cell, step, _ in self.lines}
        self.file = self._rewrite()

    def write(self, event: Event) -> None:
        cell, step = event.cell.name, event.progress.step
        if step <= self.reached.get(cell, 0):
            self.file.close()
            self.lines = [line for line in self.lines if line[0] != cell or line[1] < step]
            self.file = self._rewrite()
        line = json.dumps({"cell": cell, **event.progress._asdict()}) + "\n"
        self.file.write(line)
        self.lines.append((cell, step, line))
        self.reached[cell] = step

    def close(self) -> None:
        self.file.close()

    def _rewrite(self) -> TextIO:
        write_whole(self.path, "".join(text for _, _, text in self.lines).encode())
        return self.path.open("a", buffering=1)

    def _read(self, line: str, number: int) -> tuple[str, int, str]:
        try:
            told = json.loads(line)
            return str(told["cell"]), int(told["step"]), line
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.path}, line {number}: expected JSON with a cell and a step, got {error}; remove the line, or "
                f"the file"
            ) from None
