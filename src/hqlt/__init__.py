"""hqlt: hybrid memory layers for PyTorch. One layer, two memories.

>>> layer = hqlt.HybridMemory(hidden_size=64, num_heads=4, window=8)
>>> y, state = layer(x)                  # x, y: [b, t, 64]
>>> y, state = layer(more, state=state)  # continues where the first call ended
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING, Any

from hqlt._version import version as __version__
from hqlt.registration import register_with_transformers

if TYPE_CHECKING:
    from hqlt import ops
    from hqlt.layer import HybridMemory, with_retention
    from hqlt.memory import MemoryState
    from hqlt.model import HQLTCache, HQLTConfig, HQLTForCausalLM, HQLTModel, preset
    from hqlt.registry import register
    from hqlt.shapes import checked
    from hqlt.state import fingerprint, load_state, save_state

__all__ = [
    "HQLTCache",
    "HQLTConfig",
    "HQLTForCausalLM",
    "HQLTModel",
    "HybridMemory",
    "MemoryState",
    "__version__",
    "checked",
    "fingerprint",
    "load_state",
    "ops",
    "preset",
    "register",
    "save_state",
    "with_retention",
]

HOME = {
    **dict.fromkeys(("HybridMemory", "with_retention"), "layer"),
    "checked": "shapes",
    "register": "registry",
    "MemoryState": "memory",
    **dict.fromkeys(("fingerprint", "load_state", "save_state"), "state"),
    **dict.fromkeys(("HQLTCache", "HQLTConfig", "HQLTForCausalLM", "HQLTModel", "preset"), "model"),
}
"""By name: the subpackage that defines it."""


def __getattr__(name: str) -> Any:
    """Load a public name or a subpackage such as `hqlt.agent` on first use: importing torch and transformers is slow.

    Raises:
        AttributeError: when there is no such name.
        ModuleNotFoundError: when a dependency is missing; the message says how to install it.
    """
    if name not in HOME and name not in {module.name for module in pkgutil.iter_modules(__path__)}:
        raise AttributeError(f"module 'hqlt' has no attribute {name!r}")
    try:
        part = importlib.import_module(f"hqlt.{HOME.get(name, name)}")
        globals()[name] = value = getattr(part, name) if name in HOME else part
    except ModuleNotFoundError as error:
        from hqlt.errors import explanation

        message = explanation(error)
        if message is None:
            raise
        raise ModuleNotFoundError(message, name=error.name) from error
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *(module.name for module in pkgutil.iter_modules(__path__))})


register_with_transformers()
