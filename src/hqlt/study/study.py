"""Studies: models, experiments and their cells."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from hqlt.errors import reason
from hqlt.registry import check_choice, find
from hqlt.train.fit import Budget
from hqlt.train.grid import Cell
from hqlt.train.task_cell import TaskCell


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A task, with the options and the budget that all models share on it."""

    task: str
    """Name of a task, or of an environment in which agents are trained."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the task or environment."""
    common: dict[str, Any] = field(default_factory=dict)
    """Options that the models share: fields of HQLTConfig, or for agents arguments of `build_memory`."""
    budget: Any
    """A Budget, or for agents an AgentBudget."""
    seeds: tuple[int, ...] | None = None
    """Seeds of weights and training data. Default: those of the study."""
    models: tuple[str, ...] | None = None
    """Labels of the models that take part, in the order in which they are run. Default: all models of the study."""
    own: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Options of single models in this experiment, by label; they override the model's other options."""
    paper: dict[str, float] = field(default_factory=dict)
    """The paper's results by model, in the units of the table."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """A comparison: every model on every experiment with every seed."""

    title: str
    """Title of the report."""
    introduction: str
    """The question that the study asks, in a few sentences."""
    models: dict[str, dict[str, Any]]
    """Options of each model, by label: fields of HQLTConfig, or for agents arguments of `build_memory`. A model with
    {trained_as: LABEL, …} is trained as the model LABEL; its other options are passed to `hqlt.with_retention` before
    the test."""
    experiments: dict[str, Experiment]
    """Experiments, by the label of their column."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of weights and training data, for experiments without seeds of their own."""
    sizes: bool = False
    """Whether the table has columns for the number of parameters and the bytes of state of every model."""

    def __post_init__(self) -> None:
        for seed in (*self.seeds, *(seed for e in self.experiments.values() for seed in e.seeds or ())):
            if not 0 <= seed < 2**32:
                raise ValueError(f"seeds: expected whole numbers from 0 to 2**32 − 1, got {seed}")

    def cells(self) -> list[Cell]:
        """List the cells of the grid: one for each experiment, model and seed.

        Raises:
            ValueError: if the options of a model do not fit together; the message names the model.
        """
        return [
            make_cell(
                experiment,
                *self.model_options(model, experiment),
                model=model,
                task=experiment.task,
                task_options=experiment.options,
                budget=experiment.budget,
                seed=seed,
                experiment=label,
            )
            for label, experiment in self.experiments.items()
            for model in experiment.models or self.models
            for seed in experiment.seeds or self.seeds
        ]

    def model_options(self, model: str, experiment: Experiment) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the options that a model is built with in an experiment, and the fields `trained_as` and `switched`
        of its cell, if it is trained as another model."""
        own = {**self.models[model], **experiment.own.get(model, {})}
        other = own.pop("trained_as", None)
        if other is None:
            return own, {}
        with error_location(f"models.{model}.trained_as"):
            check_choice("label", other, [label for label, fields in self.models.items() if "trained_as" not in fields])
        return self.model_options(other, experiment)[0], {"trained_as": other, "switched": own}

    def only(self, label: str | None) -> Study:
        """Return the study with a single experiment, or with all of them if `label` is None."""
        if label is None:
            return self
        check_choice("only", label, self.experiments)
        return dataclasses.replace(self, experiments={label: self.experiments[label]})

    def quick(self) -> Study:
        """Return the study with budgets too small to learn, to check that everything runs."""
        small = {label: dataclasses.replace(e, budget=quick_budget(e.budget)) for label, e in self.experiments.items()}
        return dataclasses.replace(self, experiments=small)


def make_cell(experiment: Experiment, own: dict[str, Any], switched: dict[str, Any], /, **fields: Any) -> Cell:
    """Make a cell of the kind that the experiment's budget is for.

    Args:
        experiment: provides the shared options and the budget.
        own: the model's own options.
        switched: the fields `trained_as` and `switched`, or nothing.
        fields: all other fields of the cell.
    """
    with error_location(f"{fields['model']} in {fields['experiment']}"):
        if isinstance(experiment.budget, Budget):
            return TaskCell(config=config_of(experiment.common, own), **fields, **switched)
        from hqlt.train.agent.cell import AgentCell

        config = {**experiment.common, **own}
        if "memory" not in config:
            got = ", ".join(map(repr, config)) or "nothing"
            raise ValueError(f"expected the key 'memory', got {got}")
        return AgentCell(config=config, **fields, **switched)


@contextlib.contextmanager
def error_location(place: object) -> Iterator[None]:
    """Prefix the message of a ValueError or ModuleNotFoundError with a place, and raise it as a ValueError."""
    try:
        yield
    except (ValueError, ModuleNotFoundError) as error:
        raise ValueError(f"{place}: {reason(error)}") from None


def quick_budget(budget: Any) -> Any:
    """Return a budget too small to learn."""
    if isinstance(budget, Budget):
        most, new = {"steps": 15, "batch_size": 32}, {"validations": 2, "validation_rows": 16, "test_rows": 64}
    else:
        most, new = {"steps": 2000, "num_envs": 8}, {"evaluations": 2, "episodes": 4, "test_episodes": 8}
        few = find("algorithm", budget.algorithm).quick_run_defaults
        budget = dataclasses.replace(budget, settings={**budget.settings, **few})
    return dataclasses.replace(budget, **new, **{name: min(getattr(budget, name), n) for name, n in most.items()})


def config_of(common: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Combine shared and own options into a model's fields of HQLTConfig; own options take precedence.

    Shared options that the model does not use are dropped. `layer_kinds` may be one kind for all layers. The default of
    `initializer_range` is 1/(2√hidden_size).

    The default of `intermediate_size` makes all models equal in size: it is three times `hidden_size`, plus the width
    that corresponds to weights that the mixers lack compared with vector mixers in all layers, minus the width that
    corresponds to weights that the write rules have in addition to one gate per head.

    Args:
        common: options shared by all models.
        own: options of this model.

    Returns:
        Fields of HQLTConfig, without `vocab_size`.

    Raises:
        ValueError: if a size is missing or not a positive number.
    """
    from hqlt.model.config import without_unused

    config = {**without_unused(common, own), **own}
    for name in ("hidden_size", "num_heads", "num_hidden_layers"):
        if not isinstance(config.get(name), int) or config[name] < 1:
            raise ValueError(f"{name}: expected a number of at least 1, got {config.get(name, 'nothing')!r}")
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    if isinstance(kinds := config.get("layer_kinds"), str):
        config["layer_kinds"] = [kinds] * layers
    added = {"initializer_range": hidden**-0.5 / 2}
    if "intermediate_size" not in config:
        missing = hidden - own_weights(json.dumps(config, default=str)) / layers / hidden  # rows of a matrix
        added["intermediate_size"] = 3 * hidden + round(missing / 3)  # an MLP has three matrices
    return added | config


@functools.cache
def own_weights(config: str) -> int:
    """Count a model's weights in its mixers and in its write rules, excluding one gate per head.

    Args:
        config: fields of HQLTConfig, as JSON.

    Returns:
        The count, or 0 if the model cannot be built.
    """
    from hqlt.model import HQLTConfig, HQLTForCausalLM

    try:
        with torch.device("meta"):
            model = HQLTForCausalLM(HQLTConfig(**json.loads(config), vocab_size=1))
    except Exception:  # `_check_buildable` reports the error
        return 0
    own = 0
    for layer in (block.memory for block in model.model.layers):
        own += count_of(layer.mixer)
        if layer.fw is not None:
            convolution = sum(layer.fw.convolved.values()) * (layer.conv.size if layer.conv else 0)
            own += max(count_of(layer.fw) + convolution - layer.heads.matrices * layer.hidden_size, 0)
    return own


def count_of(part: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in part.parameters())
