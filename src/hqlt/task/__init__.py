"""Tasks: one file per task, registered by name, with a worked example in the docstring."""

from hqlt.task.associative_recall import AssociativeRecall
from hqlt.task.bracketed_arithmetic import BracketedArithmetic
from hqlt.task.cycle_navigation import CycleNavigation
from hqlt.task.even_pairs import EvenPairs
from hqlt.task.fact_extraction import FactExtraction
from hqlt.task.modular_arithmetic import ModularArithmetic
from hqlt.task.needles import Needles
from hqlt.task.parity import Parity
from hqlt.task.permutations import Permutations
from hqlt.task.selective_copying import SelectiveCopying
from hqlt.task.state_recall import StateRecall
from hqlt.task.state_tracking import StateTracking, VariableLengthTask
from hqlt.task.task import IGNORE, Batch, Split, Task, generator_for
from hqlt.task.text import StandardLibrary

__all__ = [
    "IGNORE",
    "AssociativeRecall",
    "Batch",
    "BracketedArithmetic",
    "CycleNavigation",
    "EvenPairs",
    "FactExtraction",
    "ModularArithmetic",
    "Needles",
    "Parity",
    "Permutations",
    "SelectiveCopying",
    "Split",
    "StandardLibrary",
    "StateRecall",
    "StateTracking",
    "Task",
    "VariableLengthTask",
    "generator_for",
]
