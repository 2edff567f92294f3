"""A progress bar for commands that read many tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def progress(label: str, total: int, least: int = 0) -> Iterator[Callable[[int], None]]:
    """A bar on stderr if there are more than `least` tokens to read. Yields a function that advances it by a number."""
    notes, amount = Console(stderr=True), TextColumn("{task.completed:,}/{task.total:,} tokens")
    columns = (TextColumn(label), BarColumn(), amount, TimeRemainingColumn())
    hidden = total <= least or not notes.is_terminal
    with Progress(*columns, console=notes, transient=True, disable=hidden) as shown:
        bar = shown.add_task("", total=total)
        yield lambda tokens: shown.advance(bar, tokens)
