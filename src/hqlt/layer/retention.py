"""Keep KV entries beyond the window in a model that already exists."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import nn

from hqlt.layer.layer import HybridMemory

Model = TypeVar("Model", bound=nn.Module)


def with_retention(model: Model, *, retention: str = "surprise", window: int | None = None, **options: Any) -> Model:
    """Copy a (trained) model so that its layers keep KV entries beyond their window.

    The copy has its own weights, so that training one model does not change the other. They equal those of the model;
    only parameters that the options add (kept_norm, kept_gate) start as in a new layer. States are not interchangeable,
    because kept entries are part of them. Layers without a KV-memory or with full attention stay as they are.

    Args:
        model: a layer, a language model (its config is changed too, so that it is saved and loaded as usual), or any
            module that contains layers, such as an agent.
        retention: "surprise", "value-norm", "random", a registered retention, or "recent" to keep none.
        window (tokens): new window of these layers. Default: each layer's own.
        **options: kept and score of the retention, and sinks, kept_alike, kept_positions, kept_norm, kept_gate of
            `hqlt.memory.KVMemory`. Options that are not given take the defaults of a new layer.

    Returns:
        The changed copy.

    Raises:
        ValueError: when options do not fit together, or when no layer can keep entries.

    Example:
        >>> import torch, hqlt
        >>> layer = hqlt.HybridMemory(hidden_size=64, num_heads=4, window=64)
        >>> longer = hqlt.with_retention(layer, retention="surprise", window=16, kept=48, sinks=4)
        >>> y, state = longer(torch.randn(1, 300, 64))
    """
    changed = copy.deepcopy(model)
    enable_retention(changed, retention=retention, window=window, **options)
    return changed


def enable_retention(
    model: nn.Module, *, retention: str, window: int | None = None, **options: Any
) -> list[HybridMemory]:
    """Make a model's layers keep KV entries beyond their window, in place; otherwise as `with_retention`.

    Args:
        model: as of `with_retention`.
        retention: as of `with_retention`.
        window (tokens): as of `with_retention`.
        **options: as of `with_retention`.

    Returns:
        The layers that were changed.

    Raises:
        ValueError: when options do not fit together, or when no layer can keep entries.

    Example:
        >>> import hqlt
        >>> from hqlt.layer import enable_retention
        >>> layer = hqlt.HybridMemory(hidden_size=64, num_heads=4, window=64)
        >>> enable_retention(layer, retention="surprise", kept=48) == [layer]
        True
    """
    layers = [part for part in model.modules() if isinstance(part, HybridMemory)]
    able = [layer for layer in layers if layer.kv is not None and layer.blend.window is not None]
    if not able:
        raise ValueError(
            f"model: expected at least one layer whose KV-memory has a window, beyond which entries can be kept, got "
            f"{_describe(layers)}"
        )
    configs = {id(config): config for part in model.modules() if (config := getattr(part, "config", None)) is not None}
    for config in configs.values():
        if hasattr(config, "set_retention"):  # a language model's; `hqlt.model` is not imported for a layer
            config.set_retention(retention, window, **options)
    for layer in able:
        layer.set_retention(retention, window, **options)
    return able


def _describe(layers: list[HybridMemory]) -> str:
    if not layers:
        return "no hqlt layer"
    full = sum(layer.kv is not None for layer in layers)
    return f"{len(layers) - full} without a KV-memory and {full} that attend to everything (window=None)"
