"""All cells of examples/tour.ipynb run, have saved outputs, and give the results that the text describes."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib
import pytest

pytest.importorskip("gymnasium")

NOTEBOOK = Path(__file__).parents[1] / "examples" / "tour.ipynb"


def test_the_tour():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert all(cell["outputs"] or cell["source"][-1].endswith(";") for cell in cells[2:] if cell["cell_type"] == "code")
    matplotlib.use("agg")
    names: dict[str, object] = {"__name__": "__main__"}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    scores = names["scores"]
    assert isinstance(scores, dict)
    assert scores["both, synchronous"] > 0.9 > 0.5 > scores["KV-memory alone"]
    assert names["in_chunks"] < 1e-10
