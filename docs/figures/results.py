"""Draws the curves of results anew, from their numbers: python docs/figures/results.py results/*/results.json"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from hqlt.report.plots import figure_of, save
from hqlt.train.agent.cell import AgentBudget, AgentCell
from hqlt.train.fit import Budget
from hqlt.train.grid import Result, result_of
from hqlt.train.task_cell import TaskCell

DRAWN = ("model", "task", "task_options", "seed", "experiment")
"""What a plot shows of a cell; an earlier version may have had other settings beside it."""


def result(kept: dict[str, Any]) -> Result:
    """Of a language model on a task, or of an agent."""
    cell = {"config": {}, **{name: kept["cell"][name] for name in DRAWN if name in kept["cell"]}}
    budget = kept["cell"]["budget"]
    if kept["test"]["metric"] == "success":
        return result_of(AgentCell(**cell, budget=AgentBudget(steps=budget["steps"], along=budget["along"])), kept)
    return result_of(TaskCell(**cell, budget=Budget(steps=budget["steps"], batch_size=budget["batch_size"])), kept)


if __name__ == "__main__":
    for file in map(Path, sys.argv[1:]):
        save(figure_of([result(kept) for kept in json.loads(file.read_text())]), file.with_name("curves.png"))
