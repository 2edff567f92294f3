"""The paper's row for a model, to stand beside ours."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from typing import Any, NamedTuple

import yaml

from hqlt.model import HQLTConfig

BLENDS = {
    "synchronous": "Synchronous",
    "delayed-streaming": "Delayed-Streaming",
    "delayed-chunk": "Delayed-Chunk",
}
ALONE = {"kv": "Transformer++", "fw": "DeltaNet"}
SIZES = {"340M": 1024, "1.3B": 2048}
"""Hidden sizes of the paper's models."""


class Counterpart(NamedTuple):
    name: str
    """The paper's model that is most like ours, such as "Synchronous, 340M"."""
    values: dict[tuple[str, str], float]
    """By task and metric."""


def tables() -> Mapping[str, Any]:
    """The paper's tables, and the tasks and metrics that they are made of."""
    text = resources.files("hqlt.evaluate").joinpath("paper.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)


def counterpart(config: HQLTConfig) -> Counterpart:
    """The paper's model with the same memories, of the size whose hidden width is nearest."""
    told = tables()
    kinds = set(config.kinds)
    model = ALONE[kinds.pop()] if len(kinds) == 1 and "hybrid" not in kinds else BLENDS[config.blend]
    size = min(SIZES, key=lambda name: abs(SIZES[name] - config.hidden_size))
    row = told["models"][size][model]
    values = {tuple(column): value for column, value in zip(told["columns"].values(), row, strict=False)}
    for local, task in told["same_data"].items():
        values |= {(local, metric): value for (of, metric), value in values.items() if of == task}
    return Counterpart(f"{model}, {size}", values)


class Line(NamedTuple):
    """One number of the table."""

    task: str
    metric: str
    ours: float
    error: float | None
    """Standard error, where the harness gives one."""
    paper: float | None


def compare(results: Mapping[str, Mapping[str, Any]], config: HQLTConfig) -> list[Line]:
    """results: the harness's, by task and "metric,filter". Accuracies become percent, as in the paper."""
    paper = counterpart(config).values
    lines = []
    for task, metrics in results.items():
        for key, value in metrics.items():
            name, _, _ = key.partition(",")
            if not isinstance(value, (int, float)) or "," not in key or name.endswith("_stderr"):
                continue
            error = metrics.get(key.replace(",", "_stderr,", 1))
            scale = 1 if "perplexity" in name or "bits" in name else 100
            known = scale * error if isinstance(error, (int, float)) else None
            lines.append(Line(task, name, scale * value, known, paper.get((task, name))))
    return lines
