"""Public docstrings document arguments, result and errors, and their examples run."""

from __future__ import annotations

import ast
import dataclasses
import doctest
import importlib
import inspect
import re
import textwrap
from typing import Any

import pytest

MODULES = (
    "hqlt", "hqlt.ops", "hqlt.memory", "hqlt.memory.fw", "hqlt.memory.kv", "hqlt.layer", "hqlt.blend", "hqlt.mixer",
    "hqlt.model", "hqlt.state", "hqlt.task", "hqlt.agent", "hqlt.data", "hqlt.train", "hqlt.evaluate", "hqlt.study",
    "hqlt.report",
)  # fmt: skip
"""Modules whose `__all__` is the public API."""
SECTIONS = ("Args", "Returns", "Raises", "Source", "Example")


def public() -> dict[str, Any]:
    """Public classes and functions, by the module that defines them."""
    found = {}
    for module in map(importlib.import_module, MODULES):
        for name in module.__all__:
            item = getattr(module, name)
            home = getattr(item, "__module__", "")
            if (inspect.isclass(item) or inspect.isroutine(item)) and home.split(".")[0] == "hqlt":
                found[f"{home}.{item.__qualname__}"] = item
    return found


PUBLIC = public()
FUNCTIONS = {name: item for name, item in PUBLIC.items() if not inspect.isclass(item)}
CLASSES = {name: item for name, item in PUBLIC.items() if inspect.isclass(item)}


def sections_of(docstring: str) -> dict[str, str]:
    """The indented text of each section, by title."""
    pattern = rf"^({'|'.join(SECTIONS)}):\n((?:(?: .*)?\n)+)"
    return dict(re.findall(pattern, docstring + "\n", flags=re.MULTILINE))


def tree_of(item: Any) -> Any:
    return ast.parse(textwrap.dedent(inspect.getsource(item))).body[0]


def undocumented_parameters(item: Any, parameters: Any, text: str) -> set[str]:
    """The parameters that the section Args does not describe."""
    names = {re.sub(r"^\*+", "", name) for name in parameters if name not in ("self", "cls")}
    return names - {
        name
        for line in re.findall(r"^ +([\w*, ]+?)(?: \(.*?\))?:", text, flags=re.MULTILINE)
        for name in re.findall(r"\w+", line)
    }


def is_record(item: type) -> bool:
    return dataclasses.is_dataclass(item) or hasattr(item, "_fields")


def is_abstract(item: type) -> bool:
    """Base classes, protocols and exceptions: classes that are not instantiated directly."""
    return (
        inspect.isabstract(item)
        or getattr(item, "_is_protocol", False)
        or issubclass(item, Exception)
        or "NotImplementedError" in inspect.getsource(item)
    )


def undocumented_fields(item: type) -> list[str]:
    """Fields without a comment on their line, a string after them, or a line under Args."""
    source, tree = textwrap.dedent(inspect.getsource(item)).splitlines(), tree_of(item)
    args = sections_of(inspect.getdoc(item) or "").get("Args", "")
    missing = []
    for node, after in zip(tree.body, [*tree.body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and "ClassVar" not in ast.unparse(node.annotation):
            name = ast.unparse(node.target)
            said = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            if not (said or "# " in source[node.end_lineno - 1] or f" {name}:" in args):
                missing.append(name)
    return missing


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_document_arguments_result_and_errors(name):
    item = FUNCTIONS[name]
    documentation, signature = inspect.getdoc(item) or "", inspect.signature(item)
    sections = sections_of(documentation)
    assert re.match(r"\S.*[.:?)]", documentation), "a first sentence"
    assert not undocumented_parameters(item, signature.parameters, sections.get("Args", ""))
    if signature.return_annotation not in (None, "None"):
        assert "Returns" in sections
    if any(isinstance(node, ast.Raise) for node in ast.walk(tree_of(item))):
        assert "Raises" in sections
    assert ">>> " in sections.get("Example", "")


@pytest.mark.parametrize("name", CLASSES)
def test_classes_document_their_arguments(name):
    item = CLASSES[name]
    documentation = item.__doc__ or ""
    sections = sections_of(inspect.cleandoc(documentation))
    assert documentation, "a docstring of its own"
    if is_record(item):
        assert not undocumented_fields(item)
        return
    if "__init__" in vars(item):
        assert not undocumented_parameters(item, inspect.signature(item.__init__).parameters, sections.get("Args", ""))
        if any(isinstance(node, ast.Raise) for node in ast.walk(tree_of(item.__init__))):
            assert "Raises" in sections
    if not is_abstract(item):
        assert ">>> " in sections.get("Example", "")


@pytest.mark.parametrize("name", CLASSES)
def test_public_methods_are_documented(name):
    """Methods that a base class documents need no docstring of their own."""
    item = CLASSES[name]
    for method, function in vars(item).items():
        function = getattr(function, "__func__", getattr(function, "fget", function))
        if inspect.isfunction(function) and not method.startswith("_") and method not in ("forward", "extra_repr"):
            assert any(getattr(getattr(base, method, None), "__doc__", None) for base in item.__mro__), method


@pytest.mark.parametrize("name", [name for name, item in PUBLIC.items() if ">>> " in (item.__doc__ or "")])
def test_examples_run(name, tmp_path, monkeypatch):
    """Each in an empty folder, with only what it imports."""
    monkeypatch.chdir(tmp_path)
    item = PUBLIC[name]
    tests = doctest.DocTestFinder(recurse=False).find(item, name, globs={})
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    printed: list[str] = []
    for test in tests:
        runner.run(test, out=printed.append)
    assert not runner.failures, "".join(printed)
    assert "+SKIP" not in (item.__doc__ or "")
