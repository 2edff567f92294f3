"""Imports point one way, and importing the library is light."""

from __future__ import annotations

import ast
import subprocess
import sys
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
    {"model"},
    {"task", "data", "train", "evaluate", "language", "agent", "report", "study", "cli"},
]
"""From the bottom to the top: a module imports from its own layer and those below."""

PARTS_THAT_KNOW_NO_MODEL = ("task", "data")

HEAVY = {
    "transformers", "tokenizers", "datasets", "pyarrow", "torchdata", "lm_eval", "matplotlib", "jinja2", "pandas",
    "scipy", "gymnasium", "jsonargparse", "rich", "tensorboard", "triton", "accelerate", "onnxscript",
}  # fmt: skip


def height(part: str) -> int:
    return next((i for i, layer in enumerate(LAYERS) if part in layer), len(LAYERS))


def imported_parts(file: Path) -> set[str]:
    """The parts of hqlt that a file names in its imports, wherever they stand."""
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
    if own in PARTS_THAT_KNOW_NO_MODEL:
        assert not parts & {"model", "layer", "mixer", "blend", "memory"}


def test_importing_hqlt_is_light():
    def loaded_by(modules: str) -> set[str]:
        code = f"import sys, {modules}; print(*{{name.partition('.')[0] for name in sys.modules}})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        return set(done.stdout.split())

    by_hqlt = loaded_by("hqlt, hqlt.data")
    assert "hqlt" in by_hqlt
    assert HEAVY & (by_hqlt - loaded_by("torch, safetensors.torch")) == set()


def test_parts_are_loaded_when_they_are_asked_for():
    code = (
        "import sys, hqlt\nassert not {'torch', 'numpy'} & set(sys.modules)\n"
        "print(hqlt.agent.SAC.__name__, hqlt.report.memory_shares.__name__, hqlt.preset('tiny').vocab_size)\n"
        "try: hqlt.nothing\nexcept AttributeError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("SAC memory_shares 256\nmodule 'hqlt' has no attribute 'nothing'\n", "")
    assert {"HybridMemory", "agent", "report", "ops", "__version__"} <= set(dir(hqlt))


def test_a_part_whose_package_is_missing_says_how_to_get_it():
    code = "import sys; sys.modules['transformers'] = None; import hqlt; hqlt.preset('tiny')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ModuleNotFoundError: expected the package transformers; pip install " in done.stderr
