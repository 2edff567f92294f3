"""Redraws the plots of studies from their numbers: python docs/figures/results.py results/*/results.json"""

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
"""Fields of a cell that a plot uses. Results of earlier versions may have other fields, which are ignored."""


def result(saved: dict[str, Any]) -> Result:
    """The result of a language model on a task, or of an agent, from its JSON."""
    cell = {"config": {}, **{name: saved["cell"][name] for name in DRAWN if name in saved["cell"]}}
    budget = saved["cell"]["budget"]
    if saved["test"]["metric"] == "success":
        return result_of(AgentCell(**cell, budget=AgentBudget(steps=budget["steps"], along=budget["along"])), saved)
    return result_of(TaskCell(**cell, budget=Budget(steps=budget["steps"], batch_size=budget["batch_size"])), saved)


if __name__ == "__main__":
    for file in map(Path, sys.argv[1:]):
        save(figure_of([result(saved) for saved in json.loads(file.read_text())]), file.with_name("curves.png"))
