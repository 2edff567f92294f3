"""Write the API's pages from its docstrings: python docs/api.py FOLDER."""

import pkgutil
import sys
import warnings
from pathlib import Path

import pdoc

import hqlt
import hqlt.model

SKIPPED = (
    "hqlt.ops.synchronous.kernels", "hqlt.bench.gpu_kernels", "hqlt.ops.onnx", "hqlt.native._memories"
)  # fmt: skip
"""What cannot be imported without triton or onnxscript, and the library of C++ functions."""


def specifications() -> list[str]:
    """pdoc's for every public module and package of hqlt that can be imported without a GPU's packages."""
    parts = [part.name for part in pkgutil.iter_modules(hqlt.__path__) if not part.name.startswith("_")]
    others = [f"hqlt.{part}" for part in parts if part not in hqlt.__all__]  # pdoc finds those in __all__
    return ["hqlt", *others, *(f"!{name}" for name in SKIPPED)]


def write(folder: Path) -> None:
    for package in (hqlt, hqlt.model):
        for name in package.__all__:  # some are imported only when they are asked for
            setattr(package, name, getattr(package, name))
    warnings.filterwarnings("ignore", "Error parsing type annotation")  # of a dataclass's or NamedTuple's __init__
    pdoc.pdoc(*specifications(), output_directory=folder)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
