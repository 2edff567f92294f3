"""The numbers of a run as it goes: one JSON line a step, TensorBoard and trackio where installed."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any, TextIO

from hqlt.disk import write_atomic


class Metrics:
    """`metrics.jsonl`: what was written after the step that a run goes on from is taken back first.

    So the file reads as if nothing had ever been interrupted. Raises ValueError where a line of it cannot be read.
    """

    def __init__(self, path: Path, step: int) -> None:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith("\n")]
        kept = [line for i, line in enumerate(whole, start=1) if _step_of(line, f"{path}, line {i}") <= step]
        write_atomic(path, "".join(kept).encode())
        self.file: TextIO = path.open("a", buffering=1)

    def write(self, line: dict[str, Any]) -> None:
        plain = {name: finite_or_none(value) if isinstance(value, float) else value for name, value in line.items()}
        self.file.write(json.dumps(plain, allow_nan=False) + "\n")

    def close(self) -> None:
        self.file.close()


def finite_or_none(number: float) -> float | None:
    """None in place of NaN and infinities, which JSON does not have."""
    return number if math.isfinite(number) else None


def _step_of(line: str, place: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{place}: expected JSON with a step, got {error}; remove the line, or the file") from error


class Trackers:
    """TensorBoard and trackio, those of them that are installed."""

    def __init__(self, folder: Path, settings: dict[str, Any], step: int) -> None:
        self.writer: Any = None
        self.trackio: Any = None
        if importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        if importlib.util.find_spec("trackio"):
            self.trackio = importlib.import_module("trackio")
            self.trackio.init(project="hqlt", name=folder.as_posix(), config=settings, resume="allow")

    def write(self, line: dict[str, Any]) -> None:
        numbers = {name: value for name, value in line.items() if name != "step" and value is not None}
        if self.writer is not None:
            for name, value in numbers.items():
                self.writer.add_scalar(name, value, line["step"])
        if self.trackio is not None:
            self.trackio.log(numbers, step=line["step"])

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
        if self.trackio is not None:
            self.trackio.finish()
