"""Ctrl-C and SIGTERM: the first one asks a command to stop and save, a second one stops it at once."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator, Sequence
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """A signal of this number asked for a stop, and what was under way has come to one."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def stop_if_asked(noted: Sequence[int]) -> None:
    """Raises Stopped once `stopping` has noted a signal."""
    if noted:
        raise Stopped(noted[0])


@contextlib.contextmanager
def stopping() -> Iterator[list[int]]:
    """Within this context the first Ctrl-C or SIGTERM only adds its number to the list, to be looked at between steps.

    From the second one on, signals do what they did before: Ctrl-C raises KeyboardInterrupt, SIGTERM ends the process.
    """
    noted: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)
        restore()

    for number in SIGNALS:
        signal.signal(number, note)
    try:
        yield noted
    finally:
        restore()
