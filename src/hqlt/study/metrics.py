"""metrics.jsonl of a study: a line for each step of a cell that is kept, and one alone."""

from __future__ import annotations

import json
from pathlib import Path

from hqlt.disk import write_whole
from hqlt.train.grid import Event


class StudyMetrics:
    """A cell that starts again takes back its lines from there on, so that no step stands in the file twice.

    Raises ValueError where a line of an earlier start cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: dict[tuple[str, int], str] = {}
        """By cell and step."""
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        for i, line in enumerate(lines, start=1):
            if line.endswith("\n"):  # the last one may have been cut by a kill
                try:
                    told = json.loads(line)
                    self.lines[str(told["cell"]), int(told["step"])] = line
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(
                        f"{path}, line {i}: expected JSON with a cell and a step, got {error}; remove the line, or the "
                        f"file"
                    ) from None
        self._rewrite()

    def write(self, event: Event) -> None:
        cell, step = event.cell.name, event.progress.step
        if (cell, step) in self.lines:
            self.file.close()
            self.lines = {(of, at): line for (of, at), line in self.lines.items() if of != cell or at < step}
            self._rewrite()
        self.lines[cell, step] = json.dumps({"cell": cell, **event.progress._asdict()}) + "\n"
        self.file.write(self.lines[cell, step])

    def close(self) -> None:
        self.file.close()

    def _rewrite(self) -> None:
        write_whole(self.path, "".join(self.lines.values()).encode())
        self.file = self.path.open("a", buffering=1)
