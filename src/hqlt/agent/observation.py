"""Observations as arrays, or as dictionaries and tuples of arrays, checked against their space."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

Space: TypeAlias = spaces.Space[Any]
Tree: TypeAlias = Any
"""An array or a tensor, or a dictionary or tuple of these, nested to any depth."""

ADVICE = "gymnasium.wrappers.FilterObservation drops entries, gymnasium.wrappers.TransformObservation changes them"


class InvalidObservation(ValueError):
    """An observation that does not belong to its space.

    Args:
        message: what was expected and what was received.
        env: index of the environment that returned it; None if the error concerns all environments.
    """

    def __init__(self, message: str, env: int | None = None) -> None:
        super().__init__(message)
        self.env = env


def subspaces(space: Space) -> dict[Any, Space] | None:
    """Return the spaces of a Dict by name, or of a Tuple by index; None for a space of arrays."""
    match space:
        case spaces.Dict():
            return dict(space.spaces)
        case spaces.Tuple():
            return dict(enumerate(space.spaces))
        case _:
            return None


def check_observation_space(space: Space, name: str = "observation_space") -> None:
    """Raise ValueError, naming the entry, if some observations of the space are not arrays."""
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


def checked_observation(space: Space, observation: Any, rows: int, name: str = "observation") -> Tree:
    """Copy observations [rows, ...] of a space into new arrays with the dtypes of the space.

    Raises:
        InvalidObservation: when an entry is missing, a shape or dtype differs from the space's, a floating-point number
            is NaN or infinite, or a discrete value is out of range.
    """
    parts = subspaces(space)
    if parts is None:
        return _array(space, observation, rows, name)
    if not (
        isinstance(observation, Mapping) if isinstance(space, spaces.Dict) else isinstance(observation, (tuple, list))
    ):
        raise InvalidObservation(f"{name}: expected entries {list(parts)}, got {type(observation).__name__}")
    got = list(observation) if isinstance(observation, Mapping) else list(range(len(observation)))
    if set(got) != set(parts):
        raise InvalidObservation(f"{name}: expected entries {list(parts)}, got {got}")
    checked = {
        key: checked_observation(part, observation[key], rows, f"{name}[{key!r}]") for key, part in parts.items()
    }
    return checked if isinstance(space, spaces.Dict) else tuple(checked.values())


def _array(space: Space, observation: Any, rows: int, name: str) -> NDArray[Any]:
    got, dtype = np.asarray(observation), np.dtype(space.dtype)
    if got.shape != (rows, *(space.shape or ())):
        raise InvalidObservation(f"{name}: expected shape {[rows, *(space.shape or ())]}, got {list(got.shape)}")
    if not np.can_cast(got.dtype, dtype, "same_kind"):
        raise InvalidObservation(f"{name}: expected {dtype}, the dtype of its space, got {got.dtype}")
    with np.errstate(over="ignore"):  # an overflow gives an infinity, which is refused below
        array = np.array(got, dtype=dtype)
    if dtype.kind == "f":
        _check_all(np.isfinite(array), array, name, "finite numbers")
    elif isinstance(space, spaces.Discrete):
        low, high = int(space.start), int(space.start + space.n)
        _check_all((low <= array) & (array < high), array, name, f"{low} … {high - 1}")
    elif isinstance(space, spaces.MultiDiscrete):
        _check_all((space.start <= array) & (array < space.start + space.nvec), array, name, f"a value of {space}")
    return array


def _check_all(good: NDArray[np.bool_], array: NDArray[Any], name: str, expected: str) -> None:
    if not good.all():
        env, *place = np.argwhere(~good)[0].tolist()
        raise InvalidObservation(f"{name}{place or ''}: expected {expected}, got {array[(env, *place)]}", env)
