"""Studies and their YAML files: every key is checked, and every model and task is built once before a study runs."""

from __future__ import annotations

import builtins
import contextlib
import dataclasses
import difflib
import functools
import inspect
import json
import re
import types
import typing
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import torch
import yaml
from jsonargparse import ArgumentError, ArgumentParser

from hqlt.errors import reason
from hqlt.layer import with_retention
from hqlt.registry import check_choice, find, names, options_of
from hqlt.train.fit import Budget
from hqlt.train.grid import Cell
from hqlt.train.task_cell import TaskCell

T = TypeVar("T")


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


def known_studies() -> dict[str, Path]:
    """Find the studies that come with the library.

    Returns:
        Paths of the YAML files by name.

    Example:
        >>> from hqlt.study import known_studies
        >>> "expressivity-laptop" in known_studies()
        True
    """
    folder = Path(str(resources.files("hqlt.study")))
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def read_study(path: Path) -> Study:
    """Read a study, and build each of its models and tasks once, so that mistakes are found before it runs.

    A study in YAML:

        title: Parity
        introduction: Which models can track a state?
        seeds: [0, 1, 2]
        models:
          DeltaNet: {layer_kinds: fw}
          Synchronous: {blend: synchronous}
        experiments:
          parity:
            task: parity
            options: {labels: prefix}
            common: {hidden_size: 32, num_heads: 4, num_hidden_layers: 1, window: 8, rope_theta: null}
            budget: {steps: 150, batch_size: 128}

    Args:
        path: a YAML file.

    Returns:
        The study.

    Raises:
        ValueError: if a key is unknown, missing or of a wrong type; the message says where, and suggests a known key.

    Example:
        >>> from hqlt.study import known_studies, read_study
        >>> study = read_study(known_studies()["demo"])
        >>> list(study.experiments)
        ['parity', 'recall', 'text']
    """
    with error_location(path):
        try:
            content = _check_keys(Study, yaml.safe_load(path.read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ValueError(f"expected a study in YAML: {error}") from None
        for label, model in _check_mapping(content["models"], "models").items():
            _check_mapping(model, f"models.{label}")
        experiments = {
            label: _experiment(experiment, f"experiments.{label}")
            for label, experiment in _check_mapping(content["experiments"], "experiments").items()
        }
        study = _build(Study, content | {"experiments": experiments})
        for label, experiment in experiments.items():
            by_model = {"models": experiment.models or (), "own": experiment.own, "paper": experiment.paper}
            for name, labels in by_model.items():
                for model in labels:
                    check_choice(f"experiments.{label}.{name}", model, study.models)
        _check_cells(study.cells())
    return study


def _experiment(content: Any, where: str) -> Experiment:
    with error_location(where):
        content = _check_keys(Experiment, content)
    for part in ("common", "options", "own", "paper"):
        _check_mapping(content.get(part, {}), f"{where}.{part}")
    for label, fields in content.get("own", {}).items():
        _check_mapping(fields, f"{where}.own.{label}")
    kind = _kind(f"{where}.task", content["task"])
    with error_location(f"{where}.budget"):
        budget_class: Any = Budget
        if kind == "world":
            from hqlt.train.agent.cell import AgentBudget as budget_class
        budget = _build(budget_class, content["budget"])
    with error_location(where):
        experiment = _build(Experiment, content | {"budget": budget})
    if kind == "task":
        with error_location(f"{where}.options"):
            _build(find(kind, experiment.task), experiment.options)
    return experiment


def _kind(where: str, name: Any) -> str:
    """Return whether a name is that of a "task" or a "world".

    Raises:
        ValueError: if it is neither; the message suggests a known name.
    """
    for kind in ("task", "world"):
        with contextlib.suppress(ValueError, ModuleNotFoundError):
            find(kind, name)
            return kind
    known = names("task")
    try:
        known += names("world")
    except ModuleNotFoundError:  # gymnasium is missing: a name unlike any task's may be that of an environment
        if not difflib.get_close_matches(str(name), known, n=1):
            raise
    check_choice(where, name, known)
    raise AssertionError


def _check_cells(cells: Sequence[Cell]) -> None:
    """Refuse an empty study, cells with equal names, and cells that cannot be built."""
    if not cells:
        raise ValueError("expected at least one model, experiment and seed, got no cells")
    count = Counter(cell.name for cell in cells)
    for cell in cells:
        with error_location(f"{cell.model} in {cell.column}"):
            if count[cell.name] > 1:
                raise ValueError(
                    f"seed {cell.seed}: expected labels that differ in letters or digits, and each seed once, got two "
                    f"cells that are both called {cell.name!r}"
                )
            _check_buildable(cell)


def _build(cls: type[T], options: Any) -> T:
    """Return cls(**options), after checking keys and types. Values that are dataclasses already are not checked."""
    options = _check_keys(cls, options)
    hints = get_type_hints(cls)
    for name, value in options.items():
        if value is None and name in hints and type(None) not in (hints[name], *get_args(hints[name])):
            raise ValueError(f"{name}: expected {describe_type(hints[name])}, got null")
    built = {name: value for name, value in options.items() if _is_built(value)}
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False)
    plain = {name: value for name, value in options.items() if name not in built}
    for name in plain:  # not add_class_arguments: it resolves a base class's annotations in the subclass's module
        parser.add_argument(f"--{name}", type=hints.get(name, Any))
    try:
        return cls(**parser.instantiate(parser.parse_object(plain)).as_dict(), **built)
    except ArgumentError as error:
        found = re.search(r'Parser key "(\w+)', str(error))
        if found is None:
            raise ValueError(str(error)) from None
        name = found[1]
        raise ValueError(f"{name}: expected {describe_type(hints[name])}, got {options[name]!r}") from None
    except TypeError as error:
        raise ValueError(str(error)) from None


TYPE_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}


def describe_type(hint: Any) -> str:
    """Describe a type to someone who writes a YAML file."""
    arguments = get_args(hint)
    match get_origin(hint):
        case typing.Literal:
            return f"one of {', '.join(map(str, arguments))}"
        case typing.Union | types.UnionType:
            return " or ".join(map(describe_type, arguments))
        case builtins.tuple | builtins.list:
            each = " and ".join(dict.fromkeys(describe_type(argument) for argument in arguments if argument is not ...))
            return f"a list, each item {each}"
        case builtins.dict:
            return "a mapping" if arguments[1] is Any else f"a mapping, each value {describe_type(arguments[1])}"
    return TYPE_NAMES.get(hint, str(hint))


def _is_built(value: Any) -> bool:
    return dataclasses.is_dataclass(value) or (isinstance(value, dict) and any(map(_is_built, value.values())))


def _check_keys(cls: type, content: Any) -> dict[str, Any]:
    """Return the mapping, after checking that all keys are options of the class and that no required one is missing."""
    options = options_of(cls)
    for name in _check_mapping(content):
        check_choice("key", name, options)
    for name, default in options.items():
        if default is inspect.Parameter.empty and name not in content:
            raise ValueError(f"expected the key {name!r}, got {', '.join(map(repr, content)) or 'nothing'}")
    return dict(content)


def _check_mapping(content: Any, where: str = "") -> dict[str, Any]:
    place = f"{where}: " if where else ""
    if not isinstance(content, dict):
        raise ValueError(f"{place}expected a mapping, got {content!r}")
    for name in content:
        if not isinstance(name, str):
            raise ValueError(f"{place}expected text as keys, got {name!r}; put it in quotes")
    return content


def _check_buildable(cell: Any) -> None:
    """Build a cell's model, on the meta device, and its task, or its environment at each value of the test.

    Raises:
        ValueError: if that fails.
    """
    from hqlt.model import HQLTConfig, HQLTForCausalLM

    try:
        with torch.device("meta"):
            if isinstance(cell, TaskCell):
                task = cell.build_task()
                config = HQLTConfig(**cell.config, vocab_size=task.vocab_size)
                if cell.switched:
                    with_retention(HQLTForCausalLM(config), **cell.switched)
                cell.budget.task_at(task, 0)
                return
            from hqlt.agent import build_memory
            from hqlt.agent.worlds import make_worlds

            settings = cell.settings
            tested = [{name: value} for name, values in cell.budget.along.items() for value in values]
            for options in ({}, *tested):
                make_worlds(settings.env, 1, 0, **settings.options | options)
            build_memory(settings.memory, **settings.model)
    except (ValueError, ModuleNotFoundError):
        raise
    except Exception as error:  # a library's error for a value of the wrong type
        got = json.dumps({**cell.config, **cell.task_options}, default=str, ensure_ascii=False)
        raise ValueError(f"expected options that the model can be built with, got {got}: {error}") from None
