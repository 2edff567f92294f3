"""What settings of algorithms may be."""

from __future__ import annotations


def at_least(least: int, **settings: int) -> None:
    """Raises ValueError that names the first that is less."""
    for name, value in settings.items():
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")


def above(bound: float, **settings: float) -> None:
    """Raises ValueError that names the first that is not above."""
    for name, value in settings.items():
        if not value > bound:
            raise ValueError(f"{name}: expected a number above {bound}, got {value}")
