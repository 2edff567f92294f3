"""Stage 0: what the window costs each layer, and so which layers stay full attention."""

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

SHARE = 5
"""One layer in so many stays full unless a number is given."""


class Choice(NamedTuple):
    """Which layers stay full attention."""

    config: HQLTConfig
    """Of the retrofitted model."""
    full: list[int]
    errors: list[float]
    """By layer: the relative squared error of its attention with window and sinks alone; empty: not measured."""

    @property
    def changed(self) -> list[int]:
        """The layers that are not full."""
        return [layer for layer in range(self.config.num_hidden_layers) if layer not in self.full]

    def as_json(self) -> dict[str, Any]:
        return {"full": self.full, "errors": self.errors}


def choose(settings: RetrofitSettings, config: HQLTConfig, errors: list[float]) -> Choice:
    """Those that the settings name; or as many as they say, with the greatest errors or by lot.

    Raises ValueError as `config_for` does, and for a number out of range.
    """
    layers, full = config.num_hidden_layers, settings.full
    if not isinstance(full, list):
        count = layers // SHARE if full is None else full
        if not 0 <= count < layers:
            raise ValueError(
                f"full: expected from 0 to {layers - 1} of the model's {layers} layers, got {count}; a list such as "
                f"[{count}] names single layers"
            )
        full = _by_lot(layers, settings.seed) if settings.full_choice == "random" else _by_error(errors)
        full = full[:count]
    full = sorted(full)
    return Choice(config_for(config, full=full, **settings.layer_options()), full, errors)


def _by_lot(layers: int, seed: int) -> list[int]:
    order: list[int] = torch.randperm(layers, generator=torch.Generator().manual_seed(seed)).tolist()
    return order


def _by_error(errors: list[float]) -> list[int]:
    return sorted(range(len(errors)), key=lambda layer: -errors[layer])


def errors_in(folder: Path, measured: dict[str, Any], measure: Callable[[], list[float]]) -> list[float]:
    """What `measure` finds, or what an earlier start of the same run has found."""
    file = folder / "layers.json"
    if file.is_file():
        found = json.loads(file.read_text())
        if found["of"] == measured:
            errors: list[float] = found["errors"]
            return errors
    errors = measure()
    write_atomic(file, json.dumps({"of": measured, "errors": errors}, indent=1).encode())
    return errors


@torch.no_grad()
def errors_of_window(settings: RetrofitSettings, teacher: HQLTForCausalLM, windows: Windows) -> list[float]:
    """By layer: Σ ‖y' − y‖² / Σ ‖y‖² of attention with window and sinks alone, y', on the teacher's own inputs, over
    the tokens for which the two differ."""
    config: Any = teacher.config
    alone = config_for(config, window=settings.window, sinks=settings.sinks, rule=NO_RULE)
    student = retrofitted(teacher, alone).eval()
    layers = list(range(alone.num_hidden_layers))
    total = [0.0] * len(layers)
    rows = -(-settings.measure_tokens // windows.length)
    batch = windows.batch(0, rows).to(teacher.device)
    with torch.autocast(teacher.device.type, torch.bfloat16, enabled=settings.precision == "bfloat16"):
        for part, scored, share in micro_batches(batch, settings.micro_batch_size, settings.reach):
            errors = layer_errors(teacher, student, part, scored, layers, share)
            total = [before + share * errors[layer] for layer, before in enumerate(total)]
    return total
