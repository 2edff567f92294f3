"""The parts of a layer that are chosen by name, and how they are built."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from hqlt import registry
from hqlt.memory import KVMemory


def choices(
    blend: str, mixer: str | None, fast_weights: str | None, retention: str | None = None
) -> dict[str, tuple[str, Any]]:
    """Return, for each argument, the chosen name and its class. A layer with one memory has only the parts it needs.

    Raises:
        ValueError: when a name is unknown, or is given for a part that the blend does not have.
    """
    chosen: dict[str, tuple[str, Any]] = {"blend": (blend, registry.find("blend", blend))}
    cls = chosen["blend"][1]
    named = {
        "mixer": (mixer, "vector", cls.has_kv and cls.has_fw),
        "fast_weights": (fast_weights, "delta", cls.has_fw),
        "retention": (retention, "recent", cls.has_kv),
    }
    for argument, (name, default, used) in named.items():
        if used:
            name = default if name is None else name
            chosen[argument] = name, registry.find({"fast_weights": "rule"}.get(argument, argument), name, argument)
        elif name is not None:
            raise ValueError(f"{argument}: expected none for blend {blend!r}, which has one memory, got {name!r}")
    if cls.has_kv:
        chosen["memory"] = "KV", KVMemory
    return chosen


def builders_of(
    blend: str, mixer: str | None, fast_weights: str | None, retention: str | None, options: dict[str, Any]
) -> dict[str, Callable[..., Any]]:
    """Return, for each argument, a function that builds the chosen part, with the part's own options bound.

    Raises:
        ValueError: as `choices`, and when no chosen part has an option.
    """
    chosen = choices(blend, mixer, fast_weights, retention)
    own = registry.split_options(options, {f"{argument}={name!r}": cls for argument, (name, cls) in chosen.items()})
    return {argument: partial(cls, **given) for (argument, (_, cls)), given in zip(chosen.items(), own, strict=True)}
