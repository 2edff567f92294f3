"""Entries kept beyond the window, switched on in a model that is there."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import nn

from hqlt.layer.layer import HybridMemory

Model = TypeVar("Model", bound=nn.Module)


def with_retention(model: Model, *, retention: str = "surprise", window: int | None = None, **options: Any) -> Model:
    """A copy of a (trained) model whose layers keep entries beyond their window.

    >>> reaches_further = hqlt.with_retention(model, window=16, kept=48, sinks=4)

    model: a layer, a language model (whose config then says so: it is saved, loaded and generates as any other), or any
    module with layers in it, such as an agent. Left as they are: layers without a KV-memory, and those that attend to
    everything (window None).

    retention: "surprise", "value-norm", "random", a registered one, or "recent" to keep none. window: of those layers
    from now on; None: each one's own. options: as of `hqlt.HybridMemory`, those of the retention (kept, score) and
    sinks, kept_alike, kept_positions, kept_norm, kept_gate; what is not given is as in a new layer, whatever the model
    had.

    The copy has weights of its own, so that training one leaves the other alone. They are those of the model; what only
    the options bring (kept_norm, kept_gate) begins as in a new layer. States are not interchangeable: what was kept is
    part of them.

    Raises ValueError for what does not fit together, and where no layer could keep anything.
    """
    changed = copy.deepcopy(model)
    enable_retention(changed, retention=retention, window=window, **options)
    return changed


def enable_retention(
    model: nn.Module, *, retention: str, window: int | None = None, **options: Any
) -> list[HybridMemory]:
    """`with_retention` of the model itself, no copy → the layers that were changed."""
    layers = [part for part in model.modules() if isinstance(part, HybridMemory)]
    able = [layer for layer in layers if layer.kv is not None and layer.blend.window is not None]
    if not able:
        raise ValueError(
            f"model: expected at least one layer whose KV-memory has a window, beyond which entries can be kept, got "
            f"{_why_not(layers)}"
        )
    configs = {id(config): config for part in model.modules() if (config := getattr(part, "config", None)) is not None}
    for config in configs.values():
        if hasattr(config, "set_retention"):  # a language model's, which nobody imports for a layer
            config.set_retention(retention, window, **options)
    for layer in able:
        layer.set_retention(retention, window, **options)
    return able


def _why_not(layers: list[HybridMemory]) -> str:
    if not layers:
        return "no layer of hqlt at all"
    full = sum(layer.kv is not None for layer in layers)
    return f"{len(layers) - full} without a KV-memory and {full} that attend to everything (window=None)"
