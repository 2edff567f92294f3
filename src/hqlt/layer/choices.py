"""What is chosen by name in a layer, and what builds it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from hqlt import registry
from hqlt.memory import KVMemory


def choices(
    blend: str, mixer: str | None, fast_weights: str | None, retention: str | None = None
) -> dict[str, tuple[str, Any]]:
    """By argument: the name that is chosen, and its class; of a layer with one memory, what that memory needs.

    Raises ValueError for an unknown name, and for a name where there is nothing to choose.
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
    """By argument: what builds the choice, with those of the options that are its own.

    Raises ValueError as `choices` does, and for an option that none of them uses.
    """
    chosen = choices(blend, mixer, fast_weights, retention)
    own = registry.split_options(options, {f"{argument}={name!r}": cls for argument, (name, cls) in chosen.items()})
    return {argument: partial(cls, **given) for (argument, (_, cls)), given in zip(chosen.items(), own, strict=True)}
