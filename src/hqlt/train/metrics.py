"""The numbers of a run during training: a JSON line per step, and trackers such as TensorBoard."""

from __future__ import annotations

import importlib.util
import json
import math
import secrets
from pathlib import Path
from typing import Any, TextIO

from hqlt.disk import write_atomic
from hqlt.errors import first_line


class Metrics:
    """The file `metrics.jsonl`. Lines after the step that a run resumes from are removed first.

    The file is therefore the same as without the interruption. Raises ValueError if a line cannot be read.
    """

    def __init__(self, path: Path, step: int) -> None:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if path.exists() else []
        complete = [line for line in lines if line.endswith("\n")]
        kept = [line for i, line in enumerate(complete, start=1) if _step_of(line, f"{path}, line {i}") <= step]
        write_atomic(path, "".join(kept).encode())
        self.file: TextIO = path.open("a", buffering=1)

    def write(self, line: dict[str, Any]) -> None:
        """Append a line."""
        plain = {name: finite_or_none(value) if isinstance(value, float) else value for name, value in line.items()}
        self.file.write(json.dumps(plain, allow_nan=False) + "\n")

    def close(self) -> None:
        self.file.close()


def finite_or_none(number: float) -> float | None:
    """None for NaN and infinities, which JSON cannot represent."""
    return number if math.isfinite(number) else None


def _step_of(line: str, place: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{place}: expected JSON with a step, got {error}; remove the line, or the file") from error


class Trackers:
    """Trackers of a run: TensorBoard and trackio if they are installed, Weights & Biases (wandb) on request.

    Raises ValueError if wandb cannot start, such as without an account.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], step: int, wandb: bool = False) -> None:
        self.writer: Any = None
        self.modules: list[Any] = []
        """Started trackers with the interface of wandb."""
        if importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        if importlib.util.find_spec("trackio"):
            trackio = importlib.import_module("trackio")
            trackio.init(project="hqlt", name=folder.as_posix(), config=settings, resume="allow")
            self.modules.append(trackio)
        if wandb:
            self.modules.append(_started_wandb(folder, settings))

    def write(self, line: dict[str, Any]) -> None:
        """Log the values of a line."""
        numbers = {name: value for name, value in line.items() if name != "step" and value is not None}
        if self.writer is not None:
            for name, value in numbers.items():
                self.writer.add_scalar(name, value, line["step"])
        for module in self.modules:
            module.log(numbers, step=line["step"])

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
        for module in self.modules:
            module.finish()


def _started_wandb(folder: Path, settings: dict[str, Any]) -> Any:
    """Start a wandb run for the folder, or continue the one that the folder has; returns the module wandb."""
    wandb: Any = importlib.import_module("wandb")
    file = folder / "wandb" / "run-id"
    if not file.exists():
        file.parent.mkdir(exist_ok=True)
        write_atomic(file, secrets.token_hex(8).encode())
    try:
        wandb.init(
            project="hqlt",
            name=folder.as_posix(),
            id=file.read_text(),
            dir=folder,
            config=settings,
            resume="allow",
            settings=wandb.Settings(console="off"),  # the live line is redrawn often; do not record it
        )
    except wandb.Error as error:
        raise ValueError(
            f"--wandb: expected a run that can start, got: {first_line(error)}; run `wandb login`, or set "
            f"WANDB_MODE=offline"
        ) from error
    return wandb
