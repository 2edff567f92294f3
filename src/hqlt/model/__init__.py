"""Language models for transformers, known to its Auto classes."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hqlt.model.cache import HQLTCache, register_cache_for_export
    from hqlt.model.config import HQLTConfig
    from hqlt.model.language_model import HQLTForCausalLM, HQLTModel
    from hqlt.model.presets import preset

HOME = {
    "HQLTCache": "cache",
    "HQLTConfig": "config",
    "HQLTForCausalLM": "language_model",
    "HQLTModel": "language_model",
    "preset": "presets",
    "register_cache_for_export": "cache",
}

__all__ = ["HQLTCache", "HQLTConfig", "HQLTForCausalLM", "HQLTModel", "preset", "register_cache_for_export"]


def __getattr__(name: str) -> Any:
    """Loaded when asked for: the configuration must be there before transformers can load the models (registration)."""
    if name in HOME:
        return getattr(importlib.import_module(f"hqlt.model.{HOME[name]}"), name)
    raise AttributeError(f"module 'hqlt.model' has no attribute {name!r}")
