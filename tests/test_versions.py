"""The ranges of pyproject.toml, and the files that pin their ends."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
TOOLS = {
    "pytest", "pytest-xdist", "hypothesis", "ruff", "mypy",
    "sphinx", "myst-parser", "furo", "sphinx-copybutton", "sphinx-autobuild", "latex2mathml",
}  # fmt: skip
"""What tests are run and pages are built with, in whichever version `make test` has."""


def ranges() -> dict[str, Requirement]:
    """By package: what `pip install '.[dev]'` asks for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["dev"]]
    for extra in Requirement(extras["dev"][0]).extras | {"lm"}:
        wanted += extras[extra]
    requirements = map(Requirement, wanted)
    return {canonicalize_name(found.name): found for found in requirements if found.name != "hqlt"}


def pinned(file: str) -> dict[str, Version]:
    lines = [line.partition("#")[0].strip() for line in (ROOT / file).read_text().splitlines()]
    pins = (Requirement(line) for line in lines if line)
    return {canonicalize_name(pin.name): Version(next(iter(pin.specifier)).version) for pin in pins}


def test_the_oldest_versions_are_the_lower_ends_of_the_ranges() -> None:
    lower = {
        name: Version(bound.version)
        for name, found in ranges().items()
        if name not in TOOLS
        for bound in found.specifier
        if bound.operator == ">="
    }
    oldest = pinned("constraints-oldest.txt")
    assert {name: oldest.get(name) for name in lower} == lower


@pytest.mark.parametrize("name", sorted(ranges()))
def test_what_make_installs_is_in_its_range(name: str) -> None:
    assert pinned("constraints.txt")[name] in ranges()[name].specifier


@pytest.mark.parametrize("name", ["torch", "transformers", "lm-eval", "gymnasium", "jsonargparse"])
def test_a_range_ends_at_a_version_that_was_seen_to_work(name: str) -> None:
    """`make test-latest` ran there. A next one may change what is relied on without a word."""
    upper = [Version(bound.version) for bound in ranges()[name].specifier if bound.operator == "<"]
    assert upper
    assert len(upper[0].release) > 1, "the next minor version, not the next major one"
