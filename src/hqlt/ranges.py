"""Ranges of the numbers in settings, and checks against them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np


class Range(NamedTuple):
    """Numbers from `least` to `most`, both included. NaN and infinity are never in a range."""

    least: float
    """Lower end."""
    most: float = math.inf
    """Upper end."""
    above: bool = False
    """Whether `least` itself is excluded."""
    whole: bool = False
    """Whether only integers are allowed."""

    def __contains__(self, value: Any) -> bool:
        number = isinstance(value, (int, np.integer) if self.whole else (int, float, np.number))
        if not number or isinstance(value, bool) or not math.isfinite(value):
            return False
        return self.least < value <= self.most if self.above else self.least <= value <= self.most

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        if self.above:
            return f"{kind} above {self.least}" + ("" if self.most == math.inf else f" and at most {self.most}")
        return (
            f"{kind} of at least {self.least}" if self.most == math.inf else f"{kind} from {self.least} to {self.most}"
        )


COUNT, INDEX = Range(1, whole=True), Range(0, whole=True)
POSITIVE, NON_NEGATIVE = Range(0, above=True), Range(0)
FRACTION, POSITIVE_FRACTION = Range(0, 1), Range(0, 1, above=True)
SEED = Range(0, 2**63 - 1, whole=True)


def check_range(name: str, value: Any, allowed: Range) -> None:
    """Raise a ValueError if the value is outside its allowed range."""
    if value not in allowed:
        raise ValueError(f"{name}: expected {allowed}, got {value!r}")


def check_ranges(settings: Any, prefix: str = "", **ranges: Range) -> None:
    """Check fields of a dataclass: numbers, every number of a tuple, and None if the field's type allows it.

    `prefix` precedes the names in error messages, such as "ppo.".

    Raises:
        ValueError: for the first field that is out of range.
    """
    types = {field.name: str(field.type) for field in dataclasses.fields(settings)}
    for name, allowed in ranges.items():
        value = getattr(settings, name)
        if value is None and "None" in types[name]:
            continue
        for number in value if isinstance(value, (tuple, list)) else (value,):
            check_range(prefix + name, number, allowed)
