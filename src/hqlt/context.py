"""Settings with the scope of a `with` block in one thread and asyncio task."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, Generic, TypeVar

from torch.compiler import is_compiling

T = TypeVar("T")


class _ThreadValue(threading.local):
    def __init__(self, value: Any) -> None:
        self.value = value


class Setting(Generic[T]):
    """A value of the current context. A new thread starts with the default, not with the value of its parent."""

    def __init__(self, name: str, default: T) -> None:
        self._variable = ContextVar(name, default=default)
        self._thread = _ThreadValue(default)

    def get(self) -> T:
        """Return the current value."""
        # torch.compile cannot read a ContextVar. It can read a thread-local attribute, and recompiles when it changes.
        return self._thread.value if is_compiling() else self._variable.get()

    @contextlib.contextmanager
    def set(self, value: T) -> Iterator[None]:
        """Context manager in which the setting has this value."""
        token, before = self._variable.set(value), self._thread.value
        self._thread.value = value
        try:
            yield
        finally:
            self._variable.reset(token)
            self._thread.value = before
