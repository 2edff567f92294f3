"""Tasks by name. Each is one file: a frozen dataclass whose docstring shows one worked example."""

from __future__ import annotations

from typing import Any

from hqlt.task.associative_recall import AssociativeRecall
from hqlt.task.bracketed_arithmetic import BracketedArithmetic
from hqlt.task.cycle_navigation import CycleNavigation
from hqlt.task.even_pairs import EvenPairs
from hqlt.task.fact_extraction import FactExtraction
from hqlt.task.modular_arithmetic import ModularArithmetic
from hqlt.task.parity import Parity
from hqlt.task.permutations import Permutations
from hqlt.task.selective_copying import SelectiveCopying
from hqlt.task.state_recall import StateRecall
from hqlt.task.state_tracking import StateTracking
from hqlt.task.task import IGNORE, Batch, Split, Task, generator_for
from hqlt.task.text import StandardLibrary

TASKS: dict[str, Any] = {
    task.name: task
    for task in (
        Parity,
        EvenPairs,
        CycleNavigation,
        ModularArithmetic,
        BracketedArithmetic,
        Permutations,
        AssociativeRecall,
        SelectiveCopying,
        StateRecall,
        StandardLibrary,
        FactExtraction,
    )
}

__all__ = [
    "IGNORE",
    "TASKS",
    "AssociativeRecall",
    "Batch",
    "BracketedArithmetic",
    "CycleNavigation",
    "EvenPairs",
    "FactExtraction",
    "ModularArithmetic",
    "Parity",
    "Permutations",
    "SelectiveCopying",
    "Split",
    "StandardLibrary",
    "StateRecall",
    "StateTracking",
    "Task",
    "generator_for",
]
