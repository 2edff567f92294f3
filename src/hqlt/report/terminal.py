"""Tables for terminals of any width, in which numbers are never truncated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import rich.table
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.text import Text

BORDER = 3
"""Characters that a column takes in addition to its text; one more closes the table."""


class FittingTable(NamedTuple):
    """A table that adapts to the terminal: headings wrap at spaces, or if that is not enough, rows become lists."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Text]]
    caption: str
    title: str = ""
    names: int = 1
    """Number of leading columns that contain names; they are left-aligned, and the heading of a row's list."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        room = options.max_width - BORDER * len(self.columns) - 1
        widths, whole = self.widths(longest_word), self.widths(cell_len)
        if sum(widths) <= room:
            while sum(widths) < min(sum(whole), room):  # distribute the remaining width over headings
                narrow = [i for i in range(len(widths)) if widths[i] < whole[i]]
                widths[min(narrow, key=widths.__getitem__)] += 1
            yield self.as_table(widths)
            return
        if self.title:
            yield Text(self.title, style="italic")
        for row in self.rows:
            yield from self.as_list(row, options.max_width)
        yield Text(self.caption, style="dim italic")

    def widths(self, heading: Callable[[str], int]) -> list[int]:
        """Return the width of every column, given a function for the width of a heading."""
        texts = zip(*self.rows, strict=True) if self.rows else [()] * len(self.columns)
        return [
            max([heading(name), *(row.cell_len for row in cells)])
            for name, cells in zip(self.columns, texts, strict=True)
        ]

    def as_table(self, widths: Sequence[int]) -> rich.table.Table:
        """Make a table with columns of these widths."""
        table = rich.table.Table(title=Text(self.title) if self.title else None, caption=Text(self.caption))
        for i, (name, width) in enumerate(zip(self.columns, widths, strict=True)):
            table.add_column(Text(name), justify="left" if i < self.names else "right", width=width)
        for row in self.rows:
            table.add_row(*row)
        return table

    def as_list(self, row: Sequence[Text], width: int) -> Iterator[Text]:
        """Yield the row's names, then a line for each number, or two lines if one is too narrow."""
        numbers = [(Text("  " + name), text) for name, text in zip(self.columns, row, strict=True)][self.names :]
        needed = max((name.cell_len + 2 + text.cell_len for name, text in numbers), default=0)
        yield Text("  ").join(row[: self.names])
        for name, text in numbers:
            gap = min(needed, width) - name.cell_len - text.cell_len
            if gap >= 2:
                yield Text.assemble(name, " " * gap, text)
            else:
                yield name
                yield Text.assemble("    ", text)


def longest_word(text: str) -> int:
    """Return the width of the longest word."""
    return max(map(cell_len, text.split()), default=0)
