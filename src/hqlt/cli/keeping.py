"""The options of commands that switch on, in a trained model, which KV entries stay visible beyond the window."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import nn

if TYPE_CHECKING:
    from hqlt.layer import HybridMemory
    from hqlt.model import HQLTConfig, HQLTForCausalLM


@dataclass(frozen=True, kw_only=True)
class Keeping:
    """As `hqlt.with_retention` takes them; without `retention` the model stays as it is."""

    retention: str | None = None
    """Keep KV entries beyond the window, in a model trained without: surprise, value-norm, random, or recent for
    none; by default the model stays as it was trained."""
    window: int | None = None
    """With --retention: tokens that KV-memories reach; the model's own by default."""
    kept: int | None = None
    """With --retention: entries that each KV head keeps beyond its window."""
    sinks: int | None = None
    """With --retention: first entries of a text that stay visible, too."""
    score: str | None = None
    """With --retention surprise: error (by default) or beta-error."""
    kept_alike: bool = False
    """With --retention: all heads keep the same entries, by the mean of their scores."""
    kept_positions: str | None = None
    """With --retention: how entries beyond the window are turned: true (by default), clamped or none."""
    kept_norm: bool = False
    """With --retention, for a model trained with it: RMSNorm of q and k of its own for entries beyond the window."""
    kept_gate: float | None = None
    """With --retention: what is added to the scores of entries beyond the window where no gate was trained."""

    def __post_init__(self) -> None:
        given = [*["window"] * (self.window is not None), *self.options]
        if self.retention is None and given:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise ValueError(f"retention: expected one beside {names}, such as --retention surprise, got none")

    @property
    def options(self) -> dict[str, Any]:
        """Those that were given."""
        given = {name: value for name, value in vars(self).items() if value is not None and value is not False}
        return {name: value for name, value in given.items() if name not in ("retention", "window")}

    def config_of(self, where: Path) -> HQLTConfig:
        """The config that the model in a folder will have. Raises ValueError for what it cannot be."""
        from hqlt.language.folder import read_config

        config = read_config(where)
        if self.retention is not None:
            config.set_retention(self.retention, self.window, **self.options)
        return config

    def load(self, where: Path, device: torch.device | str, console: Console) -> HQLTForCausalLM:
        """The language model in a folder, as it was asked for."""
        from hqlt.language.folder import load_model

        model = load_model(where, device)
        self.enable_retention(model, console)
        return model

    def enable_retention(self, model: nn.Module, console: Console) -> None:
        """Change the model, where something was asked for, and print in a line what it is and what it costs."""
        from hqlt.layer import HybridMemory, enable_retention

        if self.retention is None:
            return
        layers = [part for part in model.modules() if isinstance(part, HybridMemory)]
        before = {layer: layer.init_state(1).bytes_per_row() for layer in layers}
        changed = enable_retention(model, retention=self.retention, window=self.window, **self.options)
        after = {layer: layer.init_state(1).bytes_per_row() for layer in changed}
        was, now = (sum(of[layer] for layer in changed) // len(changed) for of in (before, after))
        console.print(
            f"retention {self.retention} in {len(changed)} of {len(layers)} layers: {told_of(changed)} a KV head; "
            f"{now:,} bytes of state a layer and sequence, {was:,} before",
            highlight=False,
            soft_wrap=True,
        )


def told_of(layers: list[HybridMemory]) -> str:
    """Windows, entries kept and sinks."""
    windows = "/".join(f"{window:,}" for window in dict.fromkeys(layer.blend.window or 0 for layer in layers))
    kv = layers[0].kv
    assert kv is not None
    kept = [f"{kv.kept - kv.sinks:,} kept"] * (kv.kept > kv.sinks) + [f"{kv.sinks} sink{'s' * (kv.sinks > 1)}"] * (
        kv.sinks > 0
    )
    return " + ".join([f"{windows} recent", *kept])
