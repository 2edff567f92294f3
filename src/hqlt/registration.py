"""Makes transformers' Auto classes know our models after a plain `import hqlt`, without importing transformers.

Importing transformers takes seconds, so it is not imported for this. Its table of configurations gets our entry when it
is loaded, by whatever import. The models' own entries follow when the first configuration is built: earlier,
transformers may still be in the middle of importing itself.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

TABLE = "transformers.models.auto.configuration_auto"


def register_with_transformers() -> None:
    if TABLE in sys.modules:
        importlib.import_module("hqlt.model.config")
    else:
        sys.meta_path.insert(0, _WaitForTable())


def name_in_transformers(*classes: type) -> None:
    """Make them attributes of transformers: `transformers serve` looks there for the architecture a config names.

    transformers imports itself a second time while it is loaded (its `direct_transformers_import`), so that a part of
    it may hold another module object than sys.modules does; both get the names.
    """
    parts = [module for name, module in list(sys.modules.items()) if name.partition(".")[0] == "transformers"]
    for package in (sys.modules["transformers"], *(vars(part).get("transformers") for part in parts)):
        if getattr(package, "__name__", None) == "transformers":
            for named in classes:
                setattr(package, named.__name__, named)


class _WaitForTable(importlib.abc.MetaPathFinder):
    """Finds nothing itself; has the table loaded as usual, and our entry made after it."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != TABLE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


class _ThenRegister(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader) -> None:
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        importlib.import_module("hqlt.model.config")
