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


def result(kept: dict[str, Any]) -> Result:
    """Of a language model on a task, or of an agent."""
    cell, budget = kept["cell"], kept["cell"]["budget"]
    if kept["test"]["metric"] == "success":
        return result_of(AgentCell(**cell | {"budget": AgentBudget(**budget)}), kept)
    return result_of(TaskCell(**cell | {"budget": Budget(**budget)}), kept)


if __name__ == "__main__":
    for file in map(Path, sys.argv[1:]):
        save(figure_of([result(kept) for kept in json.loads(file.read_text())]), file.with_name("curves.png"))
