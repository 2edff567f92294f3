"""Tasks by name. Each is one file: a frozen dataclass whose docstring shows one worked example."""

from __future__ import annotations

from hqlt.task.associative_recall import AssociativeRecall
from hqlt.task.parity import Parity
from hqlt.task.task import IGNORE, Batch, Split, Task, generator_for
from hqlt.task.text import StandardLibrary

TASKS: dict[str, type[Task]] = {"parity": Parity, "recall": AssociativeRecall, "text": StandardLibrary}

__all__ = [
    "IGNORE",
    "TASKS",
    "AssociativeRecall",
    "Batch",
    "Parity",
    "Split",
    "StandardLibrary",
    "Task",
    "generator_for",
]
