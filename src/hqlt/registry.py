"""What is chosen by name, and who answers to it: one registry for everything that can be added from outside.

    @hqlt.register("rule", "decaying")
    class Decaying(FWMemory): ...

From then on `fast_weights="decaying"` means this class: in a layer, a config, a study's YAML, on the command line, and
in what was saved. A package that registers on import and names its module in the entry-point group "hqlt" is imported
when a name is asked for that nobody here has.
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
"""By kind: the part of this package whose import registers our own."""

_known: dict[str, dict[str, type]] = {kind: {} for kind in HOME}


def register(kind: str, name: str) -> Callable[[C], C]:
    """A decorator: from now on this name means the class, wherever one of its kind is chosen.

    kind: "rule", "retention", "mixer", "blend", "task", "world" or "algorithm". The class's options are the
    keyword-only arguments of its constructor.

    Raises ValueError for an unknown kind and for a name that another class has.
    """
    check_choice("kind", kind, HOME)

    def enter(cls: C) -> C:
        holder = _known[kind].setdefault(name, cls)
        # the same class, defined anew where a module is imported again
        if holder is not cls and (holder.__module__, holder.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(
                f"name: expected one that no {kind} has, got {name!r}, which is {holder.__module__}."
                f"{holder.__qualname__}; choose another"
            )
        _known[kind][name] = cls
        return cls

    return enter


def names(kind: str) -> list[str]:
    """All names of a kind, ours first."""
    importlib.import_module(HOME[kind])
    return list(_known[kind])


def find(kind: str, name: str, argument: str | None = None) -> Any:
    """The class of this name. argument: what the name was given as, for the error.

    Raises ValueError for a name that nobody has, with the nearest one.
    """
    if name not in names(kind):
        load_plugins()
    check_choice(argument or kind, name, _known[kind])
    return _known[kind][name]


def load_plugins() -> None:
    """Import what other packages name in the entry-point group "hqlt"."""
    for plugin in entry_points(group="hqlt"):
        plugin.load()


def name_of(kind: str, cls: type) -> str:
    """The name under which a class was registered; its own where it was not."""
    return next((name for name, known in _known[kind].items() if known is cls), cls.__name__)


@functools.cache
def options_of(cls: Callable[..., Any]) -> dict[str, Any]:
    """The options of a class or function, with their defaults (inspect.Parameter.empty where there is none)."""
    arguments = inspect.signature(cls).parameters.values()
    return {argument.name: argument.default for argument in arguments if argument.kind is argument.KEYWORD_ONLY}


def split_options(options: dict[str, Any], takers: dict[str, Callable[..., Any]]) -> list[dict[str, Any]]:
    """Each taker's own options. takers: by what chose them, such as "fast_weights='delta'".

    Raises ValueError for an option that none of them uses.
    """
    known = {choice: options_of(taker) for choice, taker in takers.items()}
    for name, value in options.items():
        if not any(name in own for own in known.values()):
            used = "; ".join(f"{choice} uses {', '.join(own) or 'none'}" for choice, own in known.items())
            near = difflib.get_close_matches(name, {name for own in known.values() for name in own}, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{name}: expected an option of what was chosen ({used}), got {name}={value!r}{hint}")
    return [{name: options[name] for name in own if name in options} for own in known.values()]


def plugin_modules() -> list[str]:
    """The modules beyond this package whose import registered something: what another process must import, too."""
    known = {cls.__module__ for classes in _known.values() for cls in classes.values()}
    return sorted(module for module in known if module.partition(".")[0] != __package__)


def build(kind: str, name: str, **options: Any) -> Any:
    """An object of the class of this name.

    Raises ValueError for a name that nobody has and for an option that the class does not use, with the nearest one.
    """
    cls = find(kind, name)
    for option in options:
        check_choice(f"{kind} {name}, option", option, options_of(cls))
    return cls(**options)


def check_choice(name: str, got: str, names: Iterable[str]) -> None:
    """Refuse a name that is not among the known ones, and offer the nearest."""
    names = list(names)
    if got not in names:
        near = difflib.get_close_matches(str(got), names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        expected = f"one of {', '.join(map(repr, names))}" if names else "none"
        raise ValueError(f"{name}: expected {expected}, got {got!r}{hint}")
