"""hqlt: hybrid memory layers. One layer, two memories.

>>> layer = hqlt.HybridMemory(hidden_size=64, num_heads=4, window=8)
>>> y, state = layer(x)                  # x, y: [b, t, 64]
>>> y, state = layer(more, state=state)  # goes on where the first call ended
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hqlt import ops
from hqlt._version import version as __version__
from hqlt.layer import HybridMemory
from hqlt.memory import MemoryState, fingerprint, load_state, save_state
from hqlt.registration import register_with_transformers
from hqlt.shapes import checked

if TYPE_CHECKING:
    from hqlt.model import HQLTCache, HQLTConfig, HQLTForCausalLM, HQLTModel, preset

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
    "save_state",
]


def __getattr__(name: str) -> Any:
    """Language models need transformers, which takes seconds to import: loaded when first asked for."""
    if name in ("HQLTCache", "HQLTConfig", "HQLTForCausalLM", "HQLTModel", "preset"):
        from hqlt import model

        return getattr(model, name)
    raise AttributeError(f"module 'hqlt' has no attribute {name!r}")


register_with_transformers()
