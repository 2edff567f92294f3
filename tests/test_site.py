"""The documentation site and its figure build without warnings."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sphinx")
pytest.importorskip("myst_parser")
pytest.importorskip("furo")

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def test_site_builds_and_loads_nothing_from_other_servers(tmp_path):
    pages, site = str(tmp_path / "pages"), str(tmp_path / "site")
    sphinx = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", str(DOCS), pages, site]
    for command in ([sys.executable, str(DOCS / "pages.py"), pages], sphinx):
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONWARNINGS": ""}
        )
        assert done.returncode == 0, done.stdout + done.stderr
    html = {page.relative_to(site).as_posix(): page.read_text() for page in Path(site).glob("**/*.html")}
    assert {"index.html", "start.html", "reference/commands.html", "results/retention/index.html"} <= set(html)
    assert "hqlt retrofit" in html["reference/commands.html"]
    assert (
        "delta rule" in html["reference/hqlt.ops.html"] and "TypeAliasForwardRef" not in html["reference/hqlt.ops.html"]
    )
    assert "<math" in html["concepts.html"]
    for name, page in html.items():
        loaded = re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=\"(https?:[^\"]+)\"", page)
        assert not loaded, f"{name} loads {loaded}"
    search = (tmp_path / "site" / "searchindex.js").read_text()
    assert "retrofit" in search


def test_every_page_is_in_the_navigation():
    sections = runpy.run_path(str(DOCS / "pages.py"))["SECTIONS"]
    listed = [page for part in sections.values() for pages in part.values() for page in pages if "/" not in page]
    assert sorted(listed) == sorted(page.stem for page in DOCS.glob("*.md"))


def test_figure_is_the_output_of_its_script():
    drawn = runpy.run_path(str(DOCS / "figures" / "layer.py"))["svg"]()
    assert (DOCS / "figures" / "layer.svg").read_text(encoding="utf-8") == drawn


def test_a_docstring_becomes_rst():
    as_rst = runpy.run_path(str(DOCS / "conf.py"))["as_rst"]
    given = (
        "What *it* does to `x`s.\n\n    y = W x\n\nx: numbers,\n    many\ny: one_\n\nArgs:\n    a: first\n    b: second"
        "\n\nReturns:\n    two\n    lines\n\nExample:\n    >>> 1\n    1"
    )
    wanted = (
        "What \\*it\\* does to \\ ``x``\\ s.\n\n::\n\n    y = W x\n\n- x: numbers, many\n- y: one\\_\n\n"
        "**Args**\n\n- a: first\n- b: second\n\n**Returns**\n\ntwo lines\n\n**Example**\n\n>>> 1\n1\n"
    )
    assert "\n".join(as_rst(given)) == wanted
