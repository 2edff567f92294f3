"""Stage 0: measure the error that the window causes in each layer, and choose the layers that keep full attention."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hqlt.data import Windows
from hqlt.disk import write_atomic
from hqlt.model import HQLTConfig, HQLTForCausalLM
from hqlt.model.pretrained.retrofit import NO_RULE, config_for, retrofitted
from hqlt.train.retrofit.losses import layer_errors, micro_batches
from hqlt.train.retrofit.settings import RetrofitSettings

FULL_EVERY = 5
"""By default, one in this many layers keeps full attention."""


class LayerChoice(NamedTuple):
    """Which layers keep full attention."""

    config: HQLTConfig
    """Config of the retrofitted model."""
    full: list[int]
    errors: list[float]
    """By layer: relative squared error of its attention with only window and sinks; empty: not measured."""

    @property
    def changed(self) -> list[int]:
        """The layers that do not keep full attention."""
        return [layer for layer in range(self.config.num_hidden_layers) if layer not in self.full]

    def as_json(self) -> dict[str, Any]:
        """The choice and the errors it is based on, for reports."""
        return {"full": self.full, "errors": self.errors}


def choose_layers(settings: RetrofitSettings, config: HQLTConfig, errors: list[float]) -> LayerChoice:
    """Choose the layers that keep full attention.

    Args:
        settings: name the layers, or how many there are: those with the largest errors, or random ones.
        config: config of the original model.
        errors: one error per layer.

    Returns:
        The layers, and the config of the retrofitted model.

    Raises:
        ValueError: when the number is out of range, and as `config_for` does.
    """
    layers, full = config.num_hidden_layers, settings.full
    if not isinstance(full, list):
        count = layers // FULL_EVERY if full is None else full
        if not 0 <= count < layers:
            raise ValueError(
                f"full: expected from 0 to {layers - 1} of the model's {layers} layers, got {count}; to name layers, "
                f"pass a list such as [{count}]"
            )
        full = _random_order(layers, settings.seed) if settings.full_choice == "random" else _by_error(errors)
        full = full[:count]
    full = sorted(full)
    return LayerChoice(config_for(config, full=full, **settings.layer_options()), full, errors)


def _random_order(layers: int, seed: int) -> list[int]:
    order: list[int] = torch.randperm(layers, generator=torch.Generator().manual_seed(seed)).tolist()
    return order


def _by_error(errors: list[float]) -> list[int]:
    return sorted(range(len(errors)), key=lambda layer: -errors[layer])


def load_or_measure_errors(folder: Path, conditions: dict[str, Any], measure: Callable[[], list[float]]) -> list[float]:
    """Return the errors in layers.json if they were measured under the same conditions; otherwise measure and save."""
    file = folder / "layers.json"
    if file.is_file():
        saved = json.loads(file.read_text())
        if saved["of"] == conditions:
            errors: list[float] = saved["errors"]
            return errors
    errors = measure()
    write_atomic(file, json.dumps({"of": conditions, "errors": errors}, indent=1).encode())
    return errors


@torch.no_grad()
def errors_of_window(settings: RetrofitSettings, teacher: HQLTForCausalLM, windows: Windows) -> list[float]:
    """The relative squared error of windowed attention in each layer, on the teacher's own inputs.

        Σ ‖y' − y‖² / Σ ‖y‖²        y: full attention, y': attention to window and sinks

    The sums run over the tokens for which the two can differ.
    """
    config: Any = teacher.config
    windowed = config_for(config, window=settings.window, sinks=settings.sinks, rule=NO_RULE)
    student = retrofitted(teacher, windowed).eval()
    layers = list(range(windowed.num_hidden_layers))
    total = [0.0] * len(layers)
    rows = -(-settings.measure_tokens // windows.length)
    batch = windows.batch(0, rows).to(teacher.device)
    with torch.autocast(teacher.device.type, torch.bfloat16, enabled=settings.precision == "bfloat16"):
        for part, scored, share in micro_batches(batch, settings.micro_batch_size, settings.visible):
            errors = layer_errors(teacher, student, part, scored, layers, share)
            total = [before + share * errors[layer] for layer, before in enumerate(total)]
    return total
