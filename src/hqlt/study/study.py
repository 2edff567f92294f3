"""What a study is, and how its YAML file is read: every key is known, and everything is built once before it runs."""

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
    """A task, and what all models get alike for it."""

    task: str
    """Name of the task; or a world's, in which agents are trained."""
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of the task or the world."""
    common: dict[str, Any] = field(default_factory=dict)
    """What the models share: fields of HQLTConfig, for agents arguments of `build_memory`."""
    budget: Any
    """A Budget; for agents an AgentBudget."""
    seeds: tuple[int, ...] | None = None
    """Of weights and training data; None: the study's."""
    models: tuple[str, ...] | None = None
    """Labels of the study's models that take part, in the order in which they are run; None: all."""
    own: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What a model has here alone, by its label: over what it has everywhere."""
    paper: dict[str, float] = field(default_factory=dict)
    """What the paper reports, by model, in the table's units."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """Every model on every experiment with every seed."""

    title: str
    introduction: str
    """What the study asks, in a few sentences."""
    models: dict[str, dict[str, Any]]
    """What makes a model what it is, by its label: fields of HQLTConfig, for agents arguments of `build_memory`. With
    {trained_as: LABEL, …} it is that model, trained alike, and all else is given to `hqlt.with_retention` before the
    test."""
    experiments: dict[str, Experiment]
    """By the label of their column."""
    seeds: tuple[int, ...] = (0,)
    """Of weights and training data, for experiments that name none."""
    sizes: bool = False
    """Whether parameters and the bytes of the state stand beside every score, not only under the table."""

    def __post_init__(self) -> None:
        for seed in (*self.seeds, *(seed for e in self.experiments.values() for seed in e.seeds or ())):
            if not 0 <= seed < 2**32:
                raise ValueError(f"seeds: expected whole numbers from 0 to 2**32 − 1, got {seed}")

    def cells(self) -> list[Cell]:
        """Raises ValueError, saying whose, where the fields of a model do not fit together."""
        return [
            cell_of(
                experiment,
                *self.built_from(model, experiment),
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

    def built_from(self, model: str, experiment: Experiment) -> tuple[dict[str, Any], dict[str, Any]]:
        """What the model is built with here, and how it is trained as another and then switched."""
        own = {**self.models[model], **experiment.own.get(model, {})}
        other = own.pop("trained_as", None)
        if other is None:
            return own, {}
        with at(f"models.{model}.trained_as"):
            check_choice("label", other, [label for label, fields in self.models.items() if "trained_as" not in fields])
        return self.built_from(other, experiment)[0], {"trained_as": other, "switched": own}

    def only(self, label: str | None) -> Study:
        """The study with one experiment; with all of them for None."""
        if label is None:
            return self
        check_choice("only", label, self.experiments)
        return dataclasses.replace(self, experiments={label: self.experiments[label]})

    def quick(self) -> Study:
        """Budgets too small to learn, to see that everything runs."""
        few = {label: dataclasses.replace(e, budget=quick(e.budget)) for label, e in self.experiments.items()}
        return dataclasses.replace(self, experiments=few)


def cell_of(given: Experiment, own: dict[str, Any], switched: dict[str, Any], /, **of_both: Any) -> Cell:
    """A cell of the kind that the budget is for."""
    with at(f"{of_both['model']} in {of_both['experiment']}"):
        if isinstance(given.budget, Budget):
            return TaskCell(config=config_of(given.common, own), **of_both, **switched)
        from hqlt.train.agent.cell import AgentCell

        config = {**given.common, **own}
        if "memory" not in config:
            got = ", ".join(map(repr, config)) or "nothing"
            raise ValueError(f"expected the key 'memory', got {got}")
        return AgentCell(config=config, **of_both, **switched)


@contextlib.contextmanager
def at(place: object) -> Iterator[None]:
    """Within this context a ValueError, and a package that is missing, is told with its place before it."""
    try:
        yield
    except (ValueError, ModuleNotFoundError) as error:
        raise ValueError(f"{place}: {reason(error)}") from None


def quick(budget: Any) -> Any:
    if isinstance(budget, Budget):
        most, new = {"steps": 15, "batch_size": 32}, {"validations": 2, "validation_rows": 16, "test_rows": 64}
    else:
        most, new = {"steps": 2000, "num_envs": 8}, {"evaluations": 2, "episodes": 4, "test_episodes": 8}
        few = find("algorithm", budget.algorithm).quick_run_defaults
        budget = dataclasses.replace(budget, settings={**budget.settings, **few})
    return dataclasses.replace(budget, **new, **{name: min(getattr(budget, name), n) for name, n in most.items()})


def config_of(common: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """A model's fields of HQLTConfig: the shared ones that it has a use for, and its own over them.

    `layer_kinds` may be one kind for all layers. Where `intermediate_size` is not given, the MLPs are three times as
    wide as the model, wider by what its mixers have fewer weights than vector mixers in all layers, and narrower by
    what its write rules have beyond one gate a head: all models are equal in size. Where `initializer_range` is not
    given, it is 1/(2√hidden_size).

    Raises ValueError where the sizes are missing or no numbers.
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
        added["intermediate_size"] = 3 * hidden + round(missing / 3)  # an MLP has three
    return added | config


@functools.cache
def own_weights(config: str) -> int:
    """How many weights a model with these fields (JSON) has in its mixers, and for its write rules beyond one gate a
    head; 0 where it cannot be built."""
    from hqlt.model import HQLTConfig, HQLTForCausalLM

    try:
        with torch.device("meta"):
            model = HQLTForCausalLM(HQLTConfig(**json.loads(config), vocab_size=1))
    except Exception:  # `_try` says why
        return 0
    own = 0
    for layer in (block.memory for block in model.model.layers):
        own += count_of(layer.mixer)
        if layer.fw is not None:
            convolution = sum(layer.fw.convolved.values()) * (layer.conv.size if layer.conv else 0)
            own += max(count_of(layer.fw) + convolution - layer.sizes.matrices * layer.hidden_size, 0)
    return own


def count_of(part: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in part.parameters())


def known_studies() -> dict[str, Path]:
    """The studies that come with the library: `expressivity-laptop` and others."""
    folder = Path(str(resources.files("hqlt.study")))
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def read_study(path: Path) -> Study:
    """Read a study and build each of its models and tasks once, so that no mistake waits until it is run.

        title: Parity
        introduction: Who tracks a state?
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

    Raises ValueError that says where a key is unknown (with the nearest that is known), missing or of a wrong type.
    """
    with at(path):
        try:
            given = _keys(Study, yaml.safe_load(path.read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ValueError(f"expected a study in YAML: {error}") from None
        for label, model in _mapping(given["models"], "models").items():
            _mapping(model, f"models.{label}")
        experiments = {
            label: _experiment(experiment, f"experiments.{label}")
            for label, experiment in _mapping(given["experiments"], "experiments").items()
        }
        study = _build(Study, given | {"experiments": experiments})
        for label, experiment in experiments.items():
            of_models = {"models": experiment.models or (), "own": experiment.own, "paper": experiment.paper}
            for name, labels in of_models.items():
                for model in labels:
                    check_choice(f"experiments.{label}.{name}", model, study.models)
        _check(study.cells())
    return study


def _experiment(given: Any, where: str) -> Experiment:
    with at(where):
        given = _keys(Experiment, given)
    for part in ("common", "options", "own", "paper"):
        _mapping(given.get(part, {}), f"{where}.{part}")
    for label, fields in given.get("own", {}).items():
        _mapping(fields, f"{where}.own.{label}")
    kind = _kind(f"{where}.task", given["task"])
    with at(f"{where}.budget"):
        budget_of: Any = Budget
        if kind == "world":
            from hqlt.train.agent.cell import AgentBudget as budget_of
        budget = _build(budget_of, given["budget"])
    with at(where):
        experiment = _build(Experiment, given | {"budget": budget})
    if kind == "task":
        with at(f"{where}.options"):
            _build(find(kind, experiment.task), experiment.options)
    return experiment


def _kind(where: str, name: Any) -> str:
    """Whether this is a "task" or a "world". Raises ValueError, with the nearest, where it is neither."""
    for kind in ("task", "world"):
        with contextlib.suppress(ValueError, ModuleNotFoundError):
            find(kind, name)
            return kind
    known = names("task")
    try:
        known += names("world")
    except ModuleNotFoundError:  # of gymnasium, without which a name that is like no task's may be a world's
        if not difflib.get_close_matches(str(name), known, n=1):
            raise
    check_choice(where, name, known)
    raise AssertionError


def _check(cells: Sequence[Cell]) -> None:
    """Raises ValueError where there are none, two have one name, or one cannot be built."""
    if not cells:
        raise ValueError("expected at least one model, experiment and seed, got none of one of them")
    count = Counter(cell.name for cell in cells)
    for cell in cells:
        with at(f"{cell.model} in {cell.column}"):
            if count[cell.name] > 1:
                raise ValueError(
                    f"seed {cell.seed}: expected labels that differ in letters or digits, and each seed once, got two "
                    f"cells that are both called {cell.name!r}"
                )
            _try(cell)


def _build(kind: type[T], given: Any) -> T:
    """kind(**given), with keys and types checked. What is built already is taken as it is."""
    given = _keys(kind, given)
    hints = get_type_hints(kind)
    for name, value in given.items():
        if value is None and name in hints and type(None) not in (hints[name], *get_args(hints[name])):
            raise ValueError(f"{name}: expected {words(hints[name])}, got nothing")
    built = {name: value for name, value in given.items() if _is_built(value)}
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False)
    plain = {name: value for name, value in given.items() if name not in built}
    for name in plain:  # not add_class_arguments: it reads a base class's annotations in the class's own module
        parser.add_argument(f"--{name}", type=hints.get(name, Any))
    try:
        return kind(**parser.instantiate(parser.parse_object(plain)).as_dict(), **built)
    except ArgumentError as error:
        found = re.search(r'Parser key "(\w+)', str(error))
        if found is None:
            raise ValueError(str(error)) from None
        name = found[1]
        raise ValueError(f"{name}: expected {words(hints[name])}, got {given[name]!r}") from None
    except TypeError as error:
        raise ValueError(str(error)) from None


WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}


def words(hint: Any) -> str:
    """What a type is called in a YAML file."""
    arguments = get_args(hint)
    match get_origin(hint):
        case typing.Literal:
            return f"one of {', '.join(map(str, arguments))}"
        case typing.Union | types.UnionType:
            return " or ".join(map(words, arguments))
        case builtins.tuple | builtins.list:
            each = " and ".join(dict.fromkeys(words(argument) for argument in arguments if argument is not ...))
            return f"a list, each of it {each}"
        case builtins.dict:
            return "keys with values" if arguments[1] is Any else f"keys, each with {words(arguments[1])}"
    return WORDS.get(hint, str(hint))


def _is_built(value: Any) -> bool:
    return dataclasses.is_dataclass(value) or (isinstance(value, dict) and any(map(_is_built, value.values())))


def _keys(kind: type, given: Any) -> dict[str, Any]:
    """The mapping, with no key that is not an option and none missing that has no default."""
    options = options_of(kind)
    for name in _mapping(given):
        check_choice("key", name, options)
    for name, default in options.items():
        if default is inspect.Parameter.empty and name not in given:
            raise ValueError(f"expected the key {name!r}, got {', '.join(map(repr, given)) or 'nothing'}")
    return dict(given)


def _mapping(given: Any, where: str = "") -> dict[str, Any]:
    place = f"{where}: " if where else ""
    if not isinstance(given, dict):
        raise ValueError(f"{place}expected keys with values, got {given!r}")
    for name in given:
        if not isinstance(name, str):
            raise ValueError(f"{place}expected text as keys, got {name!r}; put it in quotes")
    return given


def _try(cell: Any) -> None:
    """Build its model, on a device that costs nothing, and its task or world, at each value that it is tested along.

    Raises ValueError where that fails.
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
    except Exception as error:  # what a library says of a wrong type
        given = json.dumps({**cell.config, **cell.task_options}, default=str, ensure_ascii=False)
        raise ValueError(f"expected values that it can be built with, got {given}: {error}") from None
