"""The API's pages can be made where there is no GPU and no triton."""

import runpy
from pathlib import Path

import pytest

pdoc = pytest.importorskip("pdoc")
SCRIPT = Path(__file__).parents[1] / "docs" / "api.py"


def test_every_module_of_the_pages_can_be_imported():
    modules = pdoc.extract.walk_specs(runpy.run_path(str(SCRIPT))["specifications"]())
    assert {"hqlt", "hqlt.ops.delta_rule", "hqlt.model", "hqlt.agent", "hqlt.cli.demo"} <= set(modules)
    assert not [name for name in modules if "kernels" in name]
    for name in modules:
        pdoc.extract.load_module(name)


def test_the_makefile_runs_the_script():
    assert "docs/api.py build/api" in (SCRIPT.parents[1] / "Makefile").read_text()
