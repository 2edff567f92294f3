"""The example of an environment of your own has fewer than twenty lines, and is solved."""

from __future__ import annotations

import ast
import runpy
from pathlib import Path

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "own_environment.py"


def test_the_example_is_short_and_solved(capsys):
    module = ast.parse(EXAMPLE.read_text())
    begin = module.body[1].lineno  # the docstring comes before
    code = [line for line in EXAMPLE.read_text().splitlines()[begin - 1 :] if line.strip()]
    assert len(code) < 20
    runpy.run_path(str(EXAMPLE))
    printed = capsys.readouterr().out.splitlines()
    assert float(printed[-1]) >= 0.9
