"""Register hqlt's models with transformers' Auto classes without importing transformers.

`hqlt.model` registers its classes when it is imported, which must happen as soon as transformers has been imported.
transformers reads no entry points, `auto_map` in a config requires `trust_remote_code`, and Python has no hook after an
import. Hence a finder in `sys.meta_path` that delegates to the other finders and registers the models after the module
has been executed.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType


class AfterTransformers:
    """A finder for `sys.meta_path` that registers hqlt's models once transformers has been imported."""

    @classmethod
    def find_spec(cls, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "transformers":
            return None
        found = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not cls)
        spec = next(filter(None, found), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                register_models()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def register_models() -> None:
    """Import `hqlt.model`, which registers its classes; warn if the transformers version is incompatible."""
    try:
        importlib.import_module("hqlt.model")
    except ImportError as error:  # an incompatible transformers must stay usable for other purposes
        warnings.warn(f"transformers' Auto classes do not know hqlt's models: {error}", stacklevel=2)


def register_with_transformers() -> None:
    """Register the models now if transformers is loaded, otherwise when it is imported."""
    if sys.modules.get("transformers"):
        register_models()
    elif AfterTransformers not in sys.meta_path:
        sys.meta_path.insert(0, AfterTransformers)
