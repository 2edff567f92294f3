"""The version ranges in pyproject.toml agree with the files that pin versions."""

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
"""Tools for tests and docs, which are not tested in their oldest versions."""


def ranges() -> dict[str, Requirement]:
    """The requirements of `pip install '.[dev]'`, by package."""
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


def test_oldest_versions_are_the_lower_bounds() -> None:
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
def test_pinned_version_is_in_its_range(name: str) -> None:
    assert pinned("constraints.txt")[name] in ranges()[name].specifier


@pytest.mark.parametrize("name", ["torch", "transformers", "lm-eval", "gymnasium", "jsonargparse"])
def test_upper_bound_is_the_next_minor_version(name: str) -> None:
    """`make test-latest` passed with the newest version in the range; later ones may change behavior."""
    upper = [Version(bound.version) for bound in ranges()[name].specifier if bound.operator == "<"]
    assert upper
    assert len(upper[0].release) > 1, "the next minor version, not the next major one"
