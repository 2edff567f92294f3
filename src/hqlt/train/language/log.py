"""What a run leaves while it goes: one JSON line an update, TensorBoard and trackio where installed, a live line."""

from __future__ import annotations

import importlib.util
import json
import resource
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import torch
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeRemainingColumn

from hqlt.train.language.trainer import Update

SPEED_OVER = 20
"""Updates that the shown speed is a mean of."""


class Metrics:
    """`metrics.jsonl`: what was written after the step that a run goes on from is taken back first.

    So the file reads as if nothing had ever been interrupted.
    """

    def __init__(self, path: Path, step: int) -> None:
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        self.history: list[dict[str, Any]] = [json.loads(line) for line in kept]
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text("".join(kept))
        unfinished.replace(path)
        self.file: TextIO = path.open("a", buffering=1)

    def write(self, line: dict[str, Any]) -> None:
        self.history.append(line)
        self.file.write(json.dumps(line) + "\n")

    def close(self) -> None:
        self.file.close()


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
            self.trackio.init(project="hqlt", name=folder.name, config=settings, resume="allow")

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


class LiveLine:
    """Loss, speed, share of the peak, gradient, memory, time left: a line that moves, or one now and then in a log."""

    def __init__(self, console: Console, steps: int, step: int, flops: float, peak: float | None) -> None:
        self.console, self.steps, self.flops, self.peak = console, steps, flops, peak
        self.bar = Progress(
            TextColumn("{task.completed:.0f}/{task.total:.0f}  {task.description}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
            speed_estimate_period=60,
        )
        self.task = self.bar.add_task("", total=steps, completed=step)
        self.times: list[tuple[float, int]] = []
        self.begun = self.spoke = time.monotonic()
        self.begun_at = step

    def __enter__(self) -> LiveLine:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def show(self, told: Update) -> float:
        """→ tokens a second, lately."""
        now = time.monotonic()
        self.times = [*self.times[-SPEED_OVER:], (now, told.tokens)]
        then, before = self.times[0]
        elapsed = now - then
        speed = (told.tokens - before) / elapsed if elapsed > 0 else 0.0
        words = [f"loss {told.loss:.3f}", f"{speed:,.0f} tokens/s"]
        if self.peak:
            words.append(f"{100 * speed * self.flops / self.peak:.0f}% of peak")
        words += [f"gradient {told.gradient_norm:.2f}", f"{memory_in_use() / 2**20:,.0f} MiB"]
        if told.skipped:
            words.append(f"{told.skipped} updates left out")
        self.bar.update(self.task, completed=told.step, description="  ".join(words))
        if told.validation is not None:
            words.append(f"validation {told.validation:.4f} bits/byte")
        late = now - self.spoke > 30 and not self.console.is_terminal
        if told.validation is not None or late:
            done = told.step - self.begun_at
            left = (now - self.begun) / max(done, 1) * (self.steps - told.step)
            self.console.print(f"{told.step:>7}  " + "  ".join(words) + f"  {left:,.0f} s left", highlight=False)
            self.spoke = now
        return speed


def memory_in_use() -> int:
    """The greatest use so far, in bytes: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
