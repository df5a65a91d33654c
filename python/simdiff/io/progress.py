"""Progress on standard error: bars on a terminal, one line per step elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

Item = TypeVar("Item")

console = Console(stderr=True)


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Hide all progress inside the with block; also usable as a decorator."""
    before, console.quiet = console.quiet, True
    try:
        yield
    finally:
        console.quiet = before


verbose = False
"""Whether what libraries log and warn is shown, see `talkative`."""


@contextlib.contextmanager
def talkative() -> Iterator[None]:
    """Show what libraries log and warn inside the with block."""
    global verbose
    before, verbose = verbose, True
    try:
        yield
    finally:
        verbose = before


def tell(text: str) -> None:
    """Print a sentence in one line, whatever the width of the terminal."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def track(items: Iterable[Item], description: str, total: int | None = None) -> Iterator[Item]:
    """Yield the items; a bar shows how many are done and how long the others will take."""
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
    """Show that a step without countable parts is running, and at its end how long it took."""
    if console.is_terminal:
        columns = TextColumn("{task.description:<34}"), SpinnerColumn(), TimeElapsedColumn()
        with Progress(*columns, console=console) as progress:
            progress.add_task(description, total=None)
            yield
        return
    start = time.monotonic()
    yield
    console.print(f"{description}: {time.monotonic() - start:.1f} s", highlight=False)


@contextlib.contextmanager
def track_bytes(total: int, description: str) -> Iterator[Callable[[int], None]]:
    """Yield a function that takes the number of bytes just done; show bytes, speed and time left.

    Without a terminal, one line at the end tells the time and the speed.
    """
    if console.is_terminal:
        columns = (
            TextColumn("{task.description:<34}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as progress:
            task = progress.add_task(description, total=total)
            yield lambda count: progress.advance(task, count)
        return
    start = time.monotonic()
    yield lambda count: None
    seconds = time.monotonic() - start
    console.print(
        f"{description}: {seconds:.1f} s, {total / 1e9:.2f} GB, "
        f"{total / 1e6 / max(seconds, 1e-9):.0f} MB/s",
        highlight=False,
    )


@contextlib.contextmanager
def track_layers(
    layers: int, num_bytes: int, description: str, *, done: int = 0
) -> Iterator[Callable[..., None]]:
    """Yield a function that takes the bytes read for a layer just done, and how many layers it is.

    A bar shows layers, bytes and time left; without a terminal one line at the end tells them.

    Args:
        layers: number of layers.
        num_bytes: that will be read.
        description: text of the bar.
        done: layers that an earlier run has done.
    """
    read, start = 0, time.monotonic()
    columns = (
        TextColumn("{task.description:<34}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("layers, {task.fields[read]} read"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=console) if console.is_terminal else None
    with bar or contextlib.nullcontext():
        task = bar.add_task(description, total=layers, completed=done, read="0 GB") if bar else None

        def advance(count: int, layers: int = 1) -> None:
            nonlocal read
            read += count
            if bar is not None and task is not None:
                bar.update(
                    task, advance=layers, read=f"{read / 1e9:.1f} of {num_bytes / 1e9:.1f} GB"
                )

        yield advance
    if bar is None:
        since = f" from layer {done} on" if done else ""
        console.print(
            f"{description}: {time.monotonic() - start:.1f} s, {layers} layers{since}, "
            f"{read / 1e9:.2f} GB of weights read",
            highlight=False,
        )
