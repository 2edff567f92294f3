"""Settings that hold for a `with` block, of one context: one thread and, within it, one asyncio task."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, Generic, TypeVar

from torch.compiler import is_compiling

T = TypeVar("T")


class _OfThread(threading.local):
    def __init__(self, value: Any) -> None:
        self.value = value


class Setting(Generic[T]):
    """A value of the current context. A new thread begins with the default, whatever the thread that starts it has."""

    def __init__(self, name: str, default: T) -> None:
        self._variable = ContextVar(name, default=default)
        self._of_thread = _OfThread(default)

    def get(self) -> T:
        # torch.compile cannot read a ContextVar. It can read a thread's attribute, and compiles again when it differs.
        return self._of_thread.value if is_compiling() else self._variable.get()

    @contextlib.contextmanager
    def set(self, value: T) -> Iterator[None]:
        token, before = self._variable.set(value), self._of_thread.value
        self._of_thread.value = value
        try:
            yield
        finally:
            self._variable.reset(token)
            self._of_thread.value = before
