"""One registry for everything that is chosen by name and can be added by other packages.

    @hqlt.register("rule", "decaying")
    class Decaying(FWMemory): ...

Afterwards `fast_weights="decaying"` selects this class in a layer, a config, a study's YAML file, on the command line
and in saved models. Modules listed in the entry-point group "hqlt" are imported when a name is unknown.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
from collections.abc import Callable, Iterable
from importlib.metadata import entry_points
from typing import Any, TypeVar

C = TypeVar("C", bound=type)

HOME = {
    "rule": "hqlt.memory.fw",
    "retention": "hqlt.memory.kv",
    "mixer": "hqlt.mixer",
    "blend": "hqlt.blend",
    "task": "hqlt.task",
    "world": "hqlt.agent.worlds",
    "algorithm": "hqlt.agent",
}
"""By kind: the package whose import registers the built-in classes."""

_known: dict[str, dict[str, type]] = {kind: {} for kind in HOME}


def register(kind: str, name: str) -> Callable[[C], C]:
    """Class decorator that makes a class available under a name, wherever one of its kind is chosen.

    The options of the class are the keyword-only arguments of its constructor.

    Args:
        kind: "rule", "retention", "mixer", "blend", "task", "world" or "algorithm".
        name: name by which the class is chosen.

    Returns:
        The decorator, which returns the class unchanged.

    Raises:
        ValueError: when the kind is unknown or the name belongs to another class.

    Example:
        >>> import hqlt
        >>> from hqlt.mixer import Mixer
        >>> @hqlt.register("mixer", "average")
        ... class Average(Mixer):
        ...     gates = lambda self, logits: (0.5, 0.5)
        >>> layer = hqlt.HybridMemory(hidden_size=64, num_heads=4, mixer="average")
    """
    check_choice("kind", kind, HOME)

    def add(cls: C) -> C:
        holder = _known[kind].setdefault(name, cls)
        # A reloaded module defines the same class again.
        if holder is not cls and (holder.__module__, holder.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(
                f"name: expected a name that no {kind} has, got {name!r}, which is {holder.__module__}."
                f"{holder.__qualname__}; choose another name"
            )
        _known[kind][name] = cls
        return cls

    return add


def names(kind: str) -> list[str]:
    """Return all names of a kind, built-in ones first."""
    importlib.import_module(HOME[kind])
    return list(_known[kind])


def find(kind: str, name: str, argument: str | None = None) -> Any:
    """Return the class registered under this name. `argument` names the argument in the error message.

    Raises:
        ValueError: when the name is unknown; the message suggests the nearest one.
    """
    if name not in names(kind):
        load_plugins()
    check_choice(argument or kind, name, _known[kind])
    return _known[kind][name]


def load_plugins() -> None:
    """Import the modules that other packages list in the entry-point group "hqlt"."""
    for plugin in entry_points(group="hqlt"):
        plugin.load()


def name_of(kind: str, cls: type) -> str:
    """Return the name under which a class is registered, or its `__name__` if it is not."""
    return next((name for name, known in _known[kind].items() if known is cls), cls.__name__)


@functools.cache
def options_of(cls: Callable[..., Any]) -> dict[str, Any]:
    """Return the keyword-only arguments of a class or function, with defaults (`inspect.Parameter.empty` if none)."""
    arguments = inspect.signature(cls).parameters.values()
    return {argument.name: argument.default for argument in arguments if argument.kind is argument.KEYWORD_ONLY}


def split_options(options: dict[str, Any], takers: dict[str, Callable[..., Any]]) -> list[dict[str, Any]]:
    """Split options among their takers, which are keyed by a label such as "fast_weights='delta'".

    Raises:
        ValueError: when no taker uses an option.
    """
    known = {choice: options_of(taker) for choice, taker in takers.items()}
    for name, value in options.items():
        if not any(name in own for own in known.values()):
            used = "; ".join(f"{choice} uses {', '.join(own) or 'none'}" for choice, own in known.items())
            near = difflib.get_close_matches(name, {name for own in known.values() for name in own}, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{name}: expected an option of the chosen parts ({used}), got {name}={value!r}{hint}")
    return [{name: options[name] for name in own if name in options} for own in known.values()]


def plugin_modules() -> list[str]:
    """Return the modules outside this package that registered a class; worker processes must import them too."""
    known = {cls.__module__ for classes in _known.values() for cls in classes.values()}
    return sorted(module for module in known if module.partition(".")[0] != __package__)


def build(kind: str, name: str, **options: Any) -> Any:
    """Construct the class registered under this name.

    Raises:
        ValueError: when the name is unknown or the class has no such option; the message suggests the nearest one.
    """
    cls = find(kind, name)
    for option in options:
        check_choice(f"{kind} {name}, option", option, options_of(cls))
    return cls(**options)


def check_choice(name: str, got: str, names: Iterable[str]) -> None:
    """Raise a ValueError if `got` is not one of `names`; the message suggests the nearest one."""
    names = list(names)
    if got not in names:
        near = difflib.get_close_matches(str(got), names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        expected = f"one of {', '.join(map(repr, names))}" if names else "none"
        raise ValueError(f"{name}: expected {expected}, got {got!r}{hint}")
