"""Generates the pages of the documentation site: python docs/pages.py FOLDER.

The pages are the guides in docs/, the home page from README.md, one page per study in results/, and the reference of
modules, commands and configurations. Links to files in docs/ and results/ become links within the site; all other links
go to the repository.
"""

from __future__ import annotations

import os
import posixpath
import re
import shutil
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

from hqlt.cli import COMMANDS, Command, load
from hqlt.cli.parser import parser_of

ROOT = Path(__file__).parents[1]
SOURCE = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"] + "/blob/main/"
SECTIONS = {
    "Start": {"": ["start"]},
    "Guides": {
        "Language models": ["data", "training", "evaluation", "convert", "retrofit"],
        "Sessions": ["states", "serving", "chat"],
        "Agents": ["agents", "worlds"],
        "Your own": ["extending"],
    },
    "Explanations": {
        "The idea": ["concepts", "rules", "retention", "expressivity", "fidelity"],
        "The code": ["architecture", "speed", "gpu"],
    },
    "Reference": {"": ["reference/index"]},
    "Results": {"": ["results/index"]},
}
"""The navigation: pages by part and section."""
API = {
    "hqlt": "The layer. `hqlt.NAME` is also all that `hqlt.model` has, `MemoryState`, `save_state`, `load_state`",
    "hqlt.ops": "Operations: pure functions of inputs and state",
    "hqlt.memory": "Memories: the state, the KV-memory, write rules",
    "hqlt.blend": "Blends: when a token reaches each memory",
    "hqlt.mixer": "Mixers: how two reads become one",
    "hqlt.model": "Language models, configuration, cache",
    "hqlt.state": "Files of states, the prefix store, small states",
    "hqlt.task": "Tasks",
    "hqlt.agent": "Agents: algorithms, memories, environments",
    "hqlt.data": "Data: tokenizers, folders of tokens",
    "hqlt.train": "Training within a budget, grids of cells",
    "hqlt.evaluate": "Scores",
    "hqlt.study": "Studies",
    "hqlt.report": "Reports",
}
AT_HOME = ("HybridMemory", "with_retention", "register", "checked")
"""The class, then the functions of `hqlt` that are on no other module's page."""


def for_site(text: str, source: str, page: str) -> str:
    """Convert a Markdown file of the repository to a page of the site, with its links and images adjusted."""

    def moved(match: re.Match[str]) -> str:
        target, anchor = match[1], match[2] or ""
        if re.match(r"\w+:|#", target):
            return match[0]
        in_tree = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        on_site = re.sub(r"^docs/", "", in_tree)
        on_site = re.sub(r"^(results/.+)/README\.md$", r"\1/index.md", on_site)
        on_site = "results/index.md" if in_tree == "results" else on_site
        if on_site == in_tree and not in_tree.startswith("results/"):
            return f"]({SOURCE}{in_tree}{anchor})"
        return f"]({posixpath.relpath(on_site, posixpath.dirname(page) or '.')}{anchor})"

    text = re.sub(r"\]\(([^)#\s]+)(#[^)]*)?\)", moved, text)
    return text.replace("```math", "```{math}")


def guides(folder: Path) -> None:
    for file in sorted((ROOT / "docs").glob("*.md")):
        (folder / file.name).write_text(for_site(file.read_text(), f"docs/{file.name}", file.name))
    for pictures in [path.parent for path in (ROOT / "docs").glob("**/*.[ps][nv]g")]:
        place = folder / pictures.relative_to(ROOT / "docs")
        shutil.copytree(pictures, place, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.md", "*.py"))
    contents = []
    for part, sections in SECTIONS.items():
        for section, pages in sections.items():
            caption = f"{part}: {section}" if section else part
            contents += ["", "```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```"]
    home = for_site((ROOT / "README.md").read_text(), "README.md", "index.md")
    (folder / "index.md").write_text(home + "\n".join(contents) + "\n")


def results(folder: Path) -> None:
    """Write one page per study, with its images, and the list of studies."""
    lines = ["# Results", "", "Each study with its table, plot and command.", ""]
    pages = []
    for study in sorted(path.parent for path in (ROOT / "results").glob("**/README.md")):
        place = study.relative_to(ROOT).as_posix()
        shutil.copytree(study, folder / place, dirs_exist_ok=True, ignore=shutil.ignore_patterns("README.md"))
        text = (study / "README.md").read_text()
        (folder / place / "index.md").write_text(for_site(text, f"{place}/README.md", f"{place}/index.md"))
        pages.append(f"{place.removeprefix('results/')}/index")
    toctree = ["```{toctree}", ":maxdepth: 1", "", *pages, "```"]
    (folder / "results" / "index.md").write_text("\n".join([*lines, *toctree]) + "\n")


def commands() -> Iterator[tuple[str, Command]]:
    """Yield each command with its name on the command line."""
    for name in COMMANDS:
        command = load(name)
        if isinstance(command, dict):
            yield from ((f"hqlt {name} {part}", one) for part, one in command.items())
        else:
            yield f"hqlt {name}", command


def reference(folder: Path) -> None:
    place = folder / "reference"
    place.mkdir(exist_ok=True)
    for module, what in API.items():
        shown = [f".. autoclass:: hqlt.{AT_HOME[0]}", *(f".. autofunction:: hqlt.{name}" for name in AT_HOME[1:])]
        directives = shown if module == "hqlt" else [f".. automodule:: {module}"]
        page = ["# `" + module + "`", "", f"{what}.", "", "```{eval-rst}", *directives, "```"]
        (place / f"{module}.md").write_text("\n".join(page) + "\n")
    os.environ |= {"COLUMNS": "100", "NO_COLOR": "1"}
    page = ["# Commands", "", "The output of `--help` for each command."]
    for name, command in commands():
        page += ["", f"## {name}", "", "```text", parser_of(command, name).format_help().rstrip(), "```"]
    (place / "commands.md").write_text("\n".join(page) + "\n")
    page = [
        "# Configurations",
        "",
        "Option files included in the library: `hqlt train --config=NAME`, `hqlt rl train --config=NAME`.",
    ]
    for file in sorted((ROOT / "src" / "hqlt" / "configs").glob("*.yaml")):
        page += ["", f"## {file.name}", "", "```yaml", file.read_text().rstrip(), "```"]
    (place / "configs.md").write_text("\n".join(page) + "\n")
    pages = ["commands", "configs", *API]
    index = ["# Reference", "", "```{toctree}", ":maxdepth: 1", "", *pages, "```"]
    (place / "index.md").write_text("\n".join(index) + "\n")


def write(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    guides(folder)
    results(folder)
    reference(folder)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
