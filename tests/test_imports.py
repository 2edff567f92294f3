"""Imports point in one direction, and importing the library is fast."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import hqlt

SOURCE = Path(hqlt.__file__).parent

LAYERS = [
    {"shapes"},
    {"registry", "registration", "native", "ops"},
    {"memory"},
    {"blend"},
    {"mixer"},
    {"layer"},
    {"model", "state"},
    {"task", "data", "train", "evaluate", "language", "agent", "report", "study", "serve", "cli"},
]
"""From bottom to top: a module imports from its own layer and from those below."""

PARTS_WITHOUT_MODELS = ("task", "data")

HEAVY = {
    "transformers", "tokenizers", "datasets", "pyarrow", "torchdata", "lm_eval", "matplotlib", "jinja2", "pandas",
    "scipy", "gymnasium", "jsonargparse", "rich", "tensorboard", "triton", "accelerate", "onnxscript", "gguf", "peft",
    "fastapi", "starlette", "pydantic", "uvicorn", "prometheus_client", "wandb", "shtab",
}  # fmt: skip


def height(part: str) -> int:
    return next((i for i, layer in enumerate(LAYERS) if part in layer), len(LAYERS))


def imported_parts(file: Path) -> set[str]:
    """Return the subpackages of hqlt that a file imports anywhere."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: expected absolute imports, got a relative one in line {node.lineno}"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("hqlt.")}


FILES = {str(file.relative_to(SOURCE)): file for file in sorted(SOURCE.rglob("*.py")) if file.parent != SOURCE}
FILES |= {name: SOURCE / name for name in ("shapes.py", "registry.py")}


@pytest.mark.parametrize("name", FILES)
def test_imports_point_down(name):
    own = Path(name).parts[0].removesuffix(".py")
    parts = imported_parts(FILES[name])
    assert {part for part in parts if height(own) < height(part) < len(LAYERS)} == set()
    if own in PARTS_WITHOUT_MODELS:
        assert not parts & {"model", "layer", "mixer", "blend", "memory"}


def at_module_level(body: list[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    """Yield the imports that run with the module: not those in functions or under TYPE_CHECKING."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            yield from at_module_level(node.orelse)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for inner in (*(getattr(node, name, []) for name in ("body", "orelse", "finalbody")),
                          *(handler.body for handler in getattr(node, "handlers", []))):  # fmt: skip
                yield from at_module_level(inner)


def packages_of(module: str) -> set[str]:
    """Return the packages that contain a module, whose import starts before its own."""
    parts = module.split(".")
    return {".".join(parts[:i]) for i in range(1, len(parts))}


def import_graph(source: Path) -> dict[str, set[str]]:
    """Return, for each module of a package, the modules and packages whose import it runs first."""
    files = {
        ".".join((source.name, *file.relative_to(source).with_suffix("").parts)).removesuffix(".__init__"): file
        for file in source.rglob("*.py")
    }
    graph = {}
    for name, file in files.items():
        wanted: set[str] = set()
        for node in at_module_level(ast.parse(file.read_text()).body):
            places = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                module = str(node.module)
                places = [f"{module}.{place}" if f"{module}.{place}" in files else module for place in places]
            wanted |= {*places, *(package for place in places for package in packages_of(place) - packages_of(name))}
        graph[name] = wanted & set(files) - {name}
    return graph


def cycle_in(graph: dict[str, set[str]]) -> tuple[str, ...] | None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return tuple(error.args[1])
    return None


def test_imports_have_no_cycle():
    assert cycle_in(import_graph(SOURCE)) is None


def test_cycles_are_found(tmp_path):
    package = tmp_path / "p"
    (package / "q").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "q" / "__init__.py").write_text("from p.q.a import f\n")
    (package / "q" / "a.py").write_text("try:\n    from p.b import g\nexcept ImportError:\n    pass\n")
    lazy = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import p.q.a\ndef g():\n    import p.q\n"
    (package / "b.py").write_text(lazy)
    assert cycle_in(import_graph(package)) is None
    (package / "b.py").write_text("class G:\n    import p.q.a\n")
    assert set(cycle_in(import_graph(package)) or ()) == {"p.b", "p.q.a"}
    (package / "b.py").write_text("from p.q import f\n")
    assert set(cycle_in(import_graph(package)) or ()) == {"p.b", "p.q", "p.q.a"}


def test_private_members_of_jsonargparse_are_not_used():
    using = {str(file): file.read_text() for file in SOURCE.rglob("*.py") if "from jsonargparse" in file.read_text()}
    assert len(using) > 1
    for name, text in using.items():
        private = [
            node.attr if isinstance(node, ast.Attribute) else node.module
            for node in ast.walk(ast.parse(text))
            if (isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"))
            or (isinstance(node, ast.ImportFrom) and str(node.module).startswith("jsonargparse."))
        ]
        assert not private, name


def test_importing_hqlt_loads_no_heavy_packages():
    def loaded_by(modules: str) -> set[str]:
        code = f"import sys, {modules}; print(*{{name.partition('.')[0] for name in sys.modules}})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        return set(done.stdout.split())

    by_hqlt = loaded_by("hqlt, hqlt.data")
    assert "hqlt" in by_hqlt
    assert HEAVY & (by_hqlt - loaded_by("torch, safetensors.torch")) == set()


def test_subpackages_are_loaded_on_demand():
    code = (
        "import sys, hqlt\nassert not {'torch', 'numpy'} & set(sys.modules)\n"
        "print(hqlt.agent.SAC.__name__, hqlt.report.memory_shares.__name__, hqlt.preset('tiny').vocab_size)\n"
        "try: hqlt.nothing\nexcept AttributeError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("SAC memory_shares 256\nmodule 'hqlt' has no attribute 'nothing'\n", "")
    assert {"HybridMemory", "agent", "report", "ops", "__version__"} <= set(dir(hqlt))


def test_a_missing_dependency_is_explained():
    code = "import sys; sys.modules['transformers'] = None; import hqlt; hqlt.preset('tiny')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ModuleNotFoundError: expected the package transformers; pip install " in done.stderr


DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def lines_of(node: ast.stmt) -> int:
    return (node.end_lineno or 0) - node.lineno + 1


def lines_of_docstrings(tree: ast.AST) -> int:
    documented = (node for node in ast.walk(tree) if isinstance(node, DOCUMENTED))
    return sum(lines_of(node.body[0]) for node in documented if ast.get_docstring(node) is not None)


def test_functions_and_files_are_short():
    """Docstrings are not counted, nor is a function's signature: that of a command lists its options."""
    for name, file in FILES.items():
        if Path(name).parts[0] not in ("ops", "native"):
            text = file.read_text()
            tree = ast.parse(text)
            assert text.count("\n") - lines_of_docstrings(tree) <= 400, name
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    body = (node.end_lineno or 0) - node.body[0].lineno + 1
                    assert body - lines_of_docstrings(node) <= 50, f"{name}: {node.name}"
