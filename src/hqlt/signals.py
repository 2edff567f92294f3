"""Ctrl-C and SIGTERM: the first one asks a command to save and stop; a second one stops it at once."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator, Sequence
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """Raised after work has been stopped because of a signal with this number."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def stop_if_asked(signals: Sequence[int]) -> None:
    """Raises Stopped if `stopping` has received a signal."""
    if signals:
        raise Stopped(signals[0])


@contextlib.contextmanager
def stopping() -> Iterator[list[int]]:
    """Within this context the first Ctrl-C or SIGTERM only adds its number to the list, to be checked between steps.

    After that, signals have their previous effect: Ctrl-C raises KeyboardInterrupt, SIGTERM ends the process.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def record(number: int, frame: FrameType | None) -> None:
        received.append(number)
        restore()

    for number in SIGNALS:
        signal.signal(number, record)
    try:
        yield received
    finally:
        restore()
