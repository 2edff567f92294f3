"""Observations: arrays, or dictionaries and tuples of arrays, checked against the space that they are said to be of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

Space: TypeAlias = spaces.Space[Any]
Tree: TypeAlias = Any
"""An array or a tensor, or a dictionary or tuple of such, at any depth."""

ADVICE = "gymnasium.wrappers.FilterObservation drops entries, gymnasium.wrappers.TransformObservation changes them"


class InvalidObservation(ValueError):
    """An observation that is not of its space; `env` is the number of the environment that gave it, None: all did."""

    def __init__(self, message: str, env: int | None = None) -> None:
        super().__init__(message)
        self.env = env


def subspaces(space: Space) -> dict[Any, Space] | None:
    """The spaces in a Dict by name, in a Tuple by number; None for a space of arrays."""
    match space:
        case spaces.Dict():
            return dict(space.spaces)
        case spaces.Tuple():
            return dict(enumerate(space.spaces))
        case _:
            return None


def check_observation_space(space: Space, name: str = "observation_space") -> None:
    """Raises ValueError that names the entry of a space whose observations are not arrays."""
    parts = subspaces(space)
    if parts is None:
        if not isinstance(space, (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)):
            raise ValueError(
                f"{name}: expected Box, Discrete, MultiDiscrete or MultiBinary, or a Dict or Tuple of them, got "
                f"{space}; {ADVICE}"
            )
    elif not parts:
        raise ValueError(f"{name}: expected at least one entry, got {space}")
    else:
        for key, part in parts.items():
            check_observation_space(part, f"{name}[{key!r}]")


def checked_observation(space: Space, seen: Any, rows: int, name: str = "observation") -> Tree:
    """Observations [rows, ...] of a space as new arrays of its dtypes.

    Raises InvalidObservation where an entry is missing, a shape or dtype is another one than the space's, a floating-point
    number is NaN or infinite, or a symbol is none of the space's.
    """
    parts = subspaces(space)
    if parts is None:
        return _array(space, seen, rows, name)
    if not (isinstance(seen, Mapping) if isinstance(space, spaces.Dict) else isinstance(seen, (tuple, list))):
        raise InvalidObservation(f"{name}: expected entries {list(parts)}, got {type(seen).__name__}")
    got = list(seen) if isinstance(seen, Mapping) else list(range(len(seen)))
    if set(got) != set(parts):
        raise InvalidObservation(f"{name}: expected entries {list(parts)}, got {got}")
    found = {key: checked_observation(part, seen[key], rows, f"{name}[{key!r}]") for key, part in parts.items()}
    return found if isinstance(space, spaces.Dict) else tuple(found.values())


def _array(space: Space, seen: Any, rows: int, name: str) -> NDArray[Any]:
    got, dtype = np.asarray(seen), np.dtype(space.dtype)
    if got.shape != (rows, *(space.shape or ())):
        raise InvalidObservation(f"{name}: expected shape {[rows, *(space.shape or ())]}, got {list(got.shape)}")
    if not np.can_cast(got.dtype, dtype, "same_kind"):
        raise InvalidObservation(f"{name}: expected {dtype}, as its space says, got {got.dtype}")
    with np.errstate(over="ignore"):  # an overflow is an infinity, which is refused below
        array = np.array(got, dtype=dtype)
    if dtype.kind == "f":
        _all(np.isfinite(array), array, name, "finite numbers")
    elif isinstance(space, spaces.Discrete):
        low, high = int(space.start), int(space.start + space.n)
        _all((low <= array) & (array < high), array, name, f"{low} … {high - 1}")
    elif isinstance(space, spaces.MultiDiscrete):
        _all((space.start <= array) & (array < space.start + space.nvec), array, name, f"a value of {space}")
    return array


def _all(good: NDArray[np.bool_], array: NDArray[Any], name: str, expected: str) -> None:
    if not good.all():
        env, *place = np.argwhere(~good)[0].tolist()
        raise InvalidObservation(f"{name}{place or ''}: expected {expected}, got {array[(env, *place)]}", env)
