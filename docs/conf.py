"""Sphinx configuration of the documentation site (`make docs`)."""

from __future__ import annotations

import re
import textwrap
import warnings
from collections.abc import Iterator
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert as mathml

import hqlt
import hqlt.model
from hqlt import shapes

project, author, release = "hqlt", "The hqlt authors", hqlt.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_copybutton"]
html_theme = "furo"
html_title = f"hqlt {release}"
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": True}
html_math_renderer = "mathml"
myst_heading_anchors = 4
autodoc_default_options = {"members": True, "undoc-members": False}
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_type_aliases = {name: name for name, alias in vars(shapes).items() if hasattr(alias, "__metadata__")}
python_maximum_signature_line_length = 100
copybutton_prompt_text = ">>> "
suppress_warnings = ["misc.highlighting_failure", "ref.python"]  # names that are defined in two modules
warnings.filterwarnings("ignore", category=DeprecationWarning)

for _package in (hqlt, hqlt.model):
    for _name in _package.__all__:  # some are imported lazily
        setattr(_package, _name, getattr(_package, _name))


def as_rst(text: str) -> Iterator[str]:
    """Convert a docstring to reStructuredText.

    Docstrings have indented equations, `code` in single backquotes, and sections such as "Args:" with items
    `name: meaning`, whose continuation lines are indented.
    """
    for block in re.split(r"\n\s*\n", textwrap.dedent(text).strip("\n")):
        title = re.match(r"(Args|Returns|Raises|Source|Example):\n", block)
        if title:
            yield from (f"**{title[1]}**", "")
            block = block[title.end() :]
        lines = textwrap.dedent(block).split("\n")
        if lines[0].startswith(">>>"):
            yield from lines
        elif not title and block.startswith("    "):
            yield from ("::", "", *block.split("\n"))
        elif any(line.startswith("    ") for line in lines[1:]) or (title and title[1] in ("Args", "Raises")):
            yield from (f"- {escaped(item)}" for item in re.split(r"\n(?=\S)", "\n".join(lines)))
        else:
            yield escaped(block)
        yield ""


def escaped(text: str) -> str:
    """Prose on one line, with reStructuredText markup escaped. `code` may be adjacent to letters."""
    parts = re.split(r"`([^`]+)`", " ".join(text.split()))
    for i, part in enumerate(parts):
        parts[i] = f"\\ ``{part}``\\ " if i % 2 else re.sub(r"([*|\\]|_(?=\W|$))", r"\\\1", part)
    return "".join(parts)


def rewrite(app: Any, what: str, name: str, item: Any, options: Any, lines: list[str]) -> None:
    inherited = re.match(r"Alias for field number \d+$", lines[0]) if lines else None  # fields of a NamedTuple
    lines[:] = [] if inherited else as_rst("\n".join(lines))


def plain_names(
    app: Any, what: str, name: str, item: Any, options: Any, *signature: str | None
) -> tuple[str | None, ...]:
    """Type aliases in signatures by name, also within a union or a tuple."""
    return tuple(text and re.sub(r"TypeAliasForwardRef\('(\w+)'\)", r"\1", text) for text in signature)


def visit_math(self: Any, node: nodes.Element) -> None:
    """Render equations as MathML, which browsers support natively."""
    self.body.append(mathml(node.astext(), display="block" if node.tagname == "math_block" else "inline"))
    raise nodes.SkipNode


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", rewrite)
    app.connect("autodoc-process-signature", plain_names)
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math, None))
