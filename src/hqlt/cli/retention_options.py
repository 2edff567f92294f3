"""Command-line options that change which KV entries of a trained model stay visible beyond the window."""

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
class RetentionOptions:
    """Options of `hqlt.with_retention`; without `retention` the model is used as it was trained."""

    retention: str | None = None
    """Which KV entries to keep beyond the window, for a model trained without it: surprise, value-norm, random, or
    recent for none; by default the model is used as it was trained."""
    window: int | None = None
    """With --retention: window of the KV-memories in tokens; default: the model's."""
    kept: int | None = None
    """With --retention: number of entries kept per KV head beyond the window."""
    sinks: int | None = None
    """With --retention: number of first entries of a text that always stay visible."""
    score: str | None = None
    """With --retention surprise: error (default) or beta-error."""
    kept_alike: bool = False
    """With --retention: all heads keep the same entries, those with the highest mean score."""
    kept_positions: str | None = None
    """With --retention: rotary positions of entries beyond the window: true (default), clamped or none."""
    kept_norm: bool = False
    """With --retention, for a model trained with it: a separate RMSNorm of q and k for entries beyond the window."""
    kept_gate: float | None = None
    """With --retention: constant added to the attention scores of entries beyond the window, if no gate was trained."""

    def __post_init__(self) -> None:
        given = [*["window"] * (self.window is not None), *self.options]
        if self.retention is None and given:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise ValueError(f"retention: expected one with {names}, such as --retention surprise, got none")

    @property
    def options(self) -> dict[str, Any]:
        """The options that were given, except retention and window."""
        given = {name: value for name, value in vars(self).items() if value is not None and value is not False}
        return {name: value for name, value in given.items() if name not in ("retention", "window")}

    def config_of(self, where: Path) -> HQLTConfig:
        """The config of the model in a folder with these options. Raises ValueError if they are invalid for it."""
        from hqlt.language.folder import read_config

        config = read_config(where)
        if self.retention is not None:
            config.set_retention(self.retention, self.window, **self.options)
        return config

    def load(self, where: Path, device: torch.device | str, console: Console) -> HQLTForCausalLM:
        """Load the language model in a folder and apply these options."""
        from hqlt.language.folder import load_model

        model = load_model(where, device)
        self.enable_retention(model, console)
        return model

    def enable_retention(self, model: nn.Module, console: Console) -> None:
        """Change the model as the options say, and print one line about the retention and its memory."""
        from hqlt.layer import HybridMemory, enable_retention

        if self.retention is None:
            return
        layers = [part for part in model.modules() if isinstance(part, HybridMemory)]
        before = {layer: layer.init_state(1).bytes_per_row() for layer in layers}
        changed = enable_retention(model, retention=self.retention, window=self.window, **self.options)
        after = {layer: layer.init_state(1).bytes_per_row() for layer in changed}
        was, now = (sum(of[layer] for layer in changed) // len(changed) for of in (before, after))
        console.print(
            f"retention {self.retention} in {len(changed)} of {len(layers)} layers: {describe(changed)} per KV head; "
            f"{now:,} bytes of state per layer and sequence, {was:,} before",
            highlight=False,
            soft_wrap=True,
        )


def describe(layers: list[HybridMemory]) -> str:
    """Windows, kept entries and sinks, such as "16 recent + 48 kept + 4 sinks"."""
    windows = "/".join(f"{window:,}" for window in dict.fromkeys(layer.blend.window or 0 for layer in layers))
    kv = layers[0].kv
    assert kv is not None
    kept = [f"{kv.kept - kv.sinks:,} kept"] * (kv.kept > kv.sinks) + [f"{kv.sinks} sink{'s' * (kv.sinks > 1)}"] * (
        kv.sinks > 0
    )
    return " + ".join([f"{windows} recent", *kept])
