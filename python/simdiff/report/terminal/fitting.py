"""Tables that fit a terminal: on a narrow one they have fewer columns, not truncated numbers."""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass, replace

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table

_UNLIMITED = 10_000


def plain_table(title: str) -> Table:
    """An empty table without vertical lines, which leave less room for numbers."""
    return Table(
        title=title,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )


@dataclass(frozen=True)
class Fitting:
    """A table that leaves out columns where they do not fit, all but one with cells of one line."""

    table: Table
    droppable: tuple[str, ...]
    """Headings of the columns that may be left out, the first one first."""
    wrapping: str = ""
    """Heading of the column whose cells may take several lines, which needs its `min_width`."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render as many columns as fit."""
        gone: list[str] = []
        wrapping = [column for column in self.table.columns if column.header == self.wrapping]
        least = sum((column.min_width or 1) + 1 for column in wrapping)
        for heading in (*self.droppable, None):
            table = _without(self.table, gone)
            wide = options.update(width=_UNLIMITED)
            narrow = _without(table, [self.wrapping])
            whole = Measurement.get(console, wide, narrow).maximum + least
            if heading is None or whole <= options.max_width:
                break
            gone.append(heading)
        yield table


def _without(table: Table, headings: Collection[str]) -> Table:
    kept = [column for column in table.columns if column.header not in headings]
    narrow = copy.copy(table)
    narrow.columns = [replace(column, _index=index) for index, column in enumerate(kept)]
    return narrow
