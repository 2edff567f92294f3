"""The paper's row for a model, to stand beside ours."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from importlib import resources
from typing import Any, NamedTuple

import yaml

from hqlt.model import HQLTConfig, preset

PERCENT = ("acc", "acc_norm", "exact_match", "contains")
"""Shares, which are told in percent; other metrics are as the harness gives them."""
AVERAGE = "average"
UNUSED = {"hybrid": (), "kv": ("mixer", "fast_weights", "beta_max"), "fw": ("window", "mixer", "rope_theta")}
"""Options that a layer of each kind has no use for."""


class Counterpart(NamedTuple):
    name: str
    """The paper's model that is ours, such as "Synchronous, 340M"."""
    values: dict[tuple[str, str], float]
    """By task and metric; of each table ("language", "recall") its "average"."""


def tables() -> Mapping[str, Any]:
    """The paper's tables, and the tasks and metrics that they are made of."""
    text = resources.files("hqlt.evaluate").joinpath("paper.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)


def counterpart(config: HQLTConfig) -> Counterpart | None:
    """The paper's model of the same layers and size; None where it has none. The vocabulary may differ."""
    told = tables()
    for name, model in told["models"].items():
        if parts_of(preset(model["preset"], **model.get("changes", {}))) == parts_of(config):
            return Counterpart(name, values_of(model, told))
    return None


def parts_of(config: HQLTConfig) -> tuple[Any, ...]:
    """What makes a model what it is."""
    layers = [(config.layer_options(layer), config.block_options(layer)) for layer in range(config.num_hidden_layers)]
    return config.intermediate_size, layers


def values_of(model: Mapping[str, Any], told: Mapping[str, Any]) -> dict[tuple[str, str], float]:
    values: dict[tuple[str, str], float] = {}
    for table, columns in told["columns"].items():
        names = [*map(tuple, columns.values()), (table, AVERAGE)]
        row = model.get(table, [None] * len(names))
        values |= {name: value for name, value in zip(names, row, strict=True) if value is not None}
    for local, task in told["same_data"].items():
        values |= {(local, metric): value for (of, metric), value in values.items() if of == task}
    return values


class Line(NamedTuple):
    """One number of the table."""

    task: str
    metric: str
    ours: float
    error: float | None
    """Standard error, where the harness gives one."""
    paper: float | None


def compare(results: Mapping[str, Mapping[str, Any]], config: HQLTConfig) -> list[Line]:
    """results: the harness's, by task and "metric,filter". Shares become percent; tables that are whole, an average."""
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
            lines.append(Line(task, name, scale * value, known, paper.get((task, name))))
    ours = {(line.task, line.metric): line.ours for line in lines}
    for table, columns in tables()["columns"].items():
        averaged = [(task, metric) for task, metric in columns.values() if metric in PERCENT]
        if ours.keys() >= set(averaged):
            mean = statistics.fmean(ours[name] for name in averaged)
            lines.append(Line(table, AVERAGE, mean, None, paper.get((table, AVERAGE))))
    return lines
