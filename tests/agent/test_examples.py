"""An environment of one's own takes fewer than twenty lines, and is solved."""

from __future__ import annotations

import ast
import runpy
from pathlib import Path

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "own_environment.py"


def test_an_environment_of_your_own(capsys):
    module = ast.parse(EXAMPLE.read_text())
    begin = module.body[1].lineno  # what stands before is the docstring
    code = [line for line in EXAMPLE.read_text().splitlines()[begin - 1 :] if line.strip()]
    assert len(code) < 20
    runpy.run_path(str(EXAMPLE))
    told = capsys.readouterr().out.splitlines()
    assert float(told[-1]) >= 0.9
