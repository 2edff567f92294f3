"""Stage 0: measure what the window costs in each layer, and choose the layers that keep full attention."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hqlt.data import Windows
from hqlt.disk import write_atomic
from hqlt.evaluate.probes import DISTANCE, PARAGRAPH, recall
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
    costs: list[float]
    """By layer, what the window costs (`costs_of_window`); empty: not measured."""

    @property
    def changed(self) -> list[int]:
        """The layers that do not keep full attention."""
        return [layer for layer in range(self.config.num_hidden_layers) if layer not in self.full]

    def as_json(self) -> dict[str, Any]:
        """The choice and the costs it is based on, for reports."""
        return {"full": self.full, "costs": self.costs}


def number_of_full(settings: RetrofitSettings, layers: int) -> int:
    """How many of a model's layers keep full attention."""
    if isinstance(settings.full, list):
        return len(settings.full)
    return layers // FULL_EVERY if settings.full is None else settings.full


def needs_costs(settings: RetrofitSettings, layers: int) -> bool:
    """Whether the choice of layers depends on what the window costs them."""
    named = isinstance(settings.full, list) or settings.full_choice == "random"
    return not named and number_of_full(settings, layers) > 0


def choose_layers(settings: RetrofitSettings, config: HQLTConfig, costs: list[float]) -> LayerChoice:
    """Choose the layers that keep full attention.

    Args:
        settings: name the layers, or how many there are: those with the highest costs, or random ones.
        config: config of the original model.
        costs: of the window in each layer; may be empty if `needs_costs` is false.

    Returns:
        The layers, and the config of the retrofitted model.

    Raises:
        ValueError: when the number is out of range, and as `config_for` does.
    """
    layers, full = config.num_hidden_layers, settings.full
    if not isinstance(full, list):
        count = number_of_full(settings, layers)
        if not 0 <= count < layers:
            raise ValueError(
                f"full: expected from 0 to {layers - 1} of the model's {layers} layers, got {count}; to name layers, "
                f"pass a list such as [{count}]"
            )
        full = _random_order(layers, settings.seed) if settings.full_choice == "random" else _by_cost(costs)
        full = full[:count]
    full = sorted(full)
    return LayerChoice(config_for(config, full=full, **settings.layer_options()), full, costs)


def _random_order(layers: int, seed: int) -> list[int]:
    order: list[int] = torch.randperm(layers, generator=torch.Generator().manual_seed(seed)).tolist()
    return order


def _by_cost(costs: list[float]) -> list[int]:
    return sorted(range(len(costs)), key=lambda layer: -costs[layer])


def load_or_measure_costs(folder: Path, conditions: dict[str, Any], measure: Callable[[], list[float]]) -> list[float]:
    """Return the costs in layers.json if they were measured under the same conditions; otherwise measure and save."""
    file = folder / "layers.json"
    if file.is_file():
        saved = json.loads(file.read_text())
        if saved["of"] == conditions:
            costs: list[float] = saved["costs"]
            return costs
    costs = measure()
    write_atomic(file, json.dumps({"of": conditions, "costs": costs}, indent=1).encode())
    return costs


@torch.no_grad()
def costs_of_window(settings: RetrofitSettings, teacher: HQLTForCausalLM, windows: Windows) -> list[float]:
    """What attention to only window and sinks costs in each layer, by the settings' `full_choice`.

    "recall": `losses_of_recall`; "error": `errors_of_attention`.
    """
    measure = losses_of_recall if settings.full_choice == "recall" else errors_of_attention
    with torch.autocast(teacher.device.type, torch.bfloat16, enabled=settings.precision == "bfloat16"):
        return measure(settings, teacher, windows)


def losses_of_recall(settings: RetrofitSettings, teacher: HQLTForCausalLM, windows: Windows) -> list[float]:
    """By layer, how much higher the teacher's loss on the second copy of a paragraph is if this layer is windowed.

    In nats per token, with full attention in all other layers. The copies are further apart than the window.
    """
    config: Any = teacher.config
    distance = min(windows.length, max(DISTANCE, 2 * settings.visible))
    paragraph = min(PARAGRAPH, distance // 4)
    rows = max(2, -(-settings.measure_tokens // (distance + paragraph)))
    texts = windows.batch(0, rows).to(teacher.device).inputs
    layers = range(config.num_hidden_layers)

    def loss(model: HQLTForCausalLM) -> float:
        return recall(model.eval(), texts, distance, paragraph)["nll"]

    def windowed(layer: int) -> HQLTForCausalLM:
        others = [other for other in layers if other != layer]
        own = config_for(config, full=others, window=settings.window, sinks=settings.sinks, rule=NO_RULE)
        return retrofitted(teacher, own)

    whole = loss(teacher)
    return [loss(windowed(layer)) - whole for layer in layers]


def errors_of_attention(settings: RetrofitSettings, teacher: HQLTForCausalLM, windows: Windows) -> list[float]:
    """By layer, the relative squared error of windowed attention, on the teacher's own inputs.

        Σ ‖y' − y‖² / Σ ‖y‖²        y: full attention, y': attention to window and sinks

    The sums run over the tokens of a micro-batch for which the two can differ. Of several micro-batches: the mean.
    """
    config: Any = teacher.config
    windowed = config_for(config, window=settings.window, sinks=settings.sinks, rule=NO_RULE)
    student = retrofitted(teacher, windowed).eval()
    layers = list(range(windowed.num_hidden_layers))
    total = [0.0] * len(layers)
    rows = -(-settings.measure_tokens // windows.length)
    batch = windows.batch(0, rows).to(teacher.device)
    for part, scored, share in micro_batches(batch, settings.micro_batch_size, settings.visible):
        errors = layer_errors(teacher, student, part, scored, layers, share)
        total = [before + share * errors[layer] for layer, before in enumerate(total)]
    return total
