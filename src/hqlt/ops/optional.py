"""Implementations that need a package which a plain installation does not bring: imported when first called."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any


def on_demand(module: str, function: str, *, package: str, install: str) -> Callable[..., Any]:
    """`function` of `module`, which imports `package`; where that is missing, a call says how to install it."""

    @functools.cache
    def load() -> Callable[..., Any]:
        try:
            implementation: Callable[..., Any] = getattr(importlib.import_module(module), function)
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] != package:
                raise
            raise ModuleNotFoundError(
                f"{function}: this backend needs the package {package!r}, which is not installed; "
                f"run `{install}`, or name another backend (None lets hqlt pick)",
                name=error.name,
            ) from None
        return implementation

    def run(*arguments: Any, **options: Any) -> Any:
        return load()(*arguments, **options)

    run.__name__ = run.__qualname__ = function
    run.__doc__ = f"`{module}.{function}`, imported when first called. Needs {package}: `{install}`."
    return run
