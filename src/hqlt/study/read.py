"""Reads studies from YAML files: every key is checked, and everything is built once before anything runs."""

from __future__ import annotations

import builtins
import contextlib
import dataclasses
import difflib
import inspect
import json
import re
import types
import typing
from collections import Counter
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import torch
import yaml
from jsonargparse import ArgumentError, ArgumentParser

from hqlt.layer import with_retention
from hqlt.registry import check_choice, find, names, options_of
from hqlt.study.study import Experiment, Study, error_location
from hqlt.train.fit import Budget
from hqlt.train.grid import Cell
from hqlt.train.task_cell import TaskCell

T = TypeVar("T")


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
