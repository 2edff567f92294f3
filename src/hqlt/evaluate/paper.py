"""The results that the paper reports for a model, to compare with ours."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from importlib import resources
from typing import Any, NamedTuple

import yaml

from hqlt.model import HQLTConfig, preset

PERCENT = ("acc", "acc_norm", "exact_match", "contains")
"""Metrics that are shares, reported in percent; other metrics are reported as the harness returns them."""
AVERAGE = "average"


class Counterpart(NamedTuple):
    """The paper's model with the same architecture as ours."""

    name: str
    """The paper's name of the model, such as "Synchronous, 340M"."""
    values: dict[tuple[str, str], float]
    """Results by (task, metric), including the "average" of each table ("language", "recall")."""


def tables() -> Mapping[str, Any]:
    """Load the paper's tables, with the tasks and metrics that they consist of."""
    text = resources.files("hqlt.evaluate").joinpath("paper.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)


def counterpart(config: HQLTConfig) -> Counterpart | None:
    """Find the paper's model with the same layers and sizes, or None. The vocabulary may differ."""
    published = tables()
    for name, model in published["models"].items():
        if architecture_of(preset(model["preset"], **model.get("changes", {}))) == architecture_of(config):
            return Counterpart(name, values_of(model, published))
    return None


def architecture_of(config: HQLTConfig) -> tuple[Any, ...]:
    """Return everything that must be equal for two models to have the same architecture."""
    layers = [(config.layer_options(layer), config.block_options(layer)) for layer in range(config.num_hidden_layers)]
    return config.intermediate_size, layers


def values_of(model: Mapping[str, Any], published: Mapping[str, Any]) -> dict[tuple[str, str], float]:
    """Collect a model's results by (task, metric)."""
    values: dict[tuple[str, str], float] = {}
    for table, columns in published["columns"].items():
        names = [*map(tuple, columns.values()), (table, AVERAGE)]
        row = model.get(table, [None] * len(names))
        values |= {name: value for name, value in zip(names, row, strict=True) if value is not None}
    for local, task in published["same_data"].items():
        values |= {(local, metric): value for (of, metric), value in values.items() if of == task}
    return values


class Comparison(NamedTuple):
    """One result of ours, and the paper's."""

    task: str
    metric: str
    ours: float
    error: float | None
    """Standard error, or None if the harness returns none."""
    paper: float | None
    """The paper's result, or None if it reports none."""


def compare(results: Mapping[str, Mapping[str, Any]], config: HQLTConfig) -> list[Comparison]:
    """Compare the harness's results with the paper's, with an average for each of its tables that is complete.

    Args:
        results: by task and "metric,filter", as the harness returns them; shares are converted to percent.
        config: of the model that was evaluated.

    Returns:
        One entry per task and metric, then the averages.
    """
    found = counterpart(config)
    paper = found.values if found else {}
    lines = []
    for task, metrics in results.items():
        for key, value in metrics.items():
            name, _, _ = key.partition(",")
            if not isinstance(value, (int, float)) or "," not in key or name.endswith("_stderr"):
                continue
            error = metrics.get(key.replace(",", "_stderr,", 1))
            scale = 100 if name in PERCENT else 1
            known = scale * error if isinstance(error, (int, float)) else None
            lines.append(Comparison(task, name, scale * value, known, paper.get((task, name))))
    ours = {(line.task, line.metric): line.ours for line in lines}
    for table, columns in tables()["columns"].items():
        averaged = [(task, metric) for task, metric in columns.values() if metric in PERCENT]
        if ours.keys() >= set(averaged):
            mean = statistics.fmean(ours[name] for name in averaged)
            lines.append(Comparison(table, AVERAGE, mean, None, paper.get((table, AVERAGE))))
    return lines
