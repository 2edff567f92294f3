"""After a bare `import hqlt`, transformers' Auto classes know our models, and transformers is not loaded for it.

`hqlt.model` registers its classes, and is imported as soon as transformers has been. transformers asks for no entry
points, `auto_map` in a config asks its users for `trust_remote_code`, and Python has no call for "after this import":
hence a finder, which finds what the others find.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType


class AfterTransformers:
    """A finder for `sys.meta_path`."""

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
    try:
        importlib.import_module("hqlt.model")
    except ImportError as error:  # another version of transformers, which serves others well
        warnings.warn(f"transformers' Auto classes do not know hqlt's models: {error}", stacklevel=2)


def register_with_transformers() -> None:
    if sys.modules.get("transformers"):
        register_models()
    elif AfterTransformers not in sys.meta_path:
        sys.meta_path.insert(0, AfterTransformers)
