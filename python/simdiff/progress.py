"""Progress on standard error: bars on a terminal, one line per step elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Item = TypeVar("Item")

console = Console(stderr=True)


def track(items: Iterable[Item], description: str, total: int | None = None) -> Iterator[Item]:
    """Yield the items while a bar shows how many are done and how long the rest will take."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    if not console.is_terminal:
        with step(description):
            yield from items
        return
    columns = (
        TextColumn("{task.description:<34}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(description, total=total)
        for item in items:
            yield item
            progress.advance(task)


@contextlib.contextmanager
def step(description: str) -> Iterator[None]:
    """Show that a step without countable parts is running, and how long it took."""
    if console.is_terminal:
        columns = TextColumn("{task.description:<34}"), SpinnerColumn(), TimeElapsedColumn()
        with Progress(*columns, console=console) as progress:
            progress.add_task(description, total=None)
            yield
        return
    start = time.monotonic()
    yield
    console.print(f"{description}: {time.monotonic() - start:.1f} s", highlight=False)
