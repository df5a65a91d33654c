"""Show the progress of a training: a bar with loss and time left, or lines without a terminal."""

from __future__ import annotations

import datetime
import math
import time

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from simdiff.evaluation.losses import exponential
from simdiff.io.progress import console, tell

# Without a terminal every evaluation prints a line, and steps at most one in this many seconds.
_SECONDS_BETWEEN_LINES = 30.0


class TrainingProgress:
    """Context manager that shows the steps and evaluations of a training.

    Args:
        num_steps: number of steps of the whole run.
        step: first step, above 0 after an interruption.
        set_apart: last loss on what is set apart, in nats per token; NaN before the first.
        shown: False shows nothing.
    """

    def __init__(
        self, num_steps: int, step: int = 0, *, set_apart: float = math.nan, shown: bool = True
    ) -> None:
        """Store the arguments; nothing is shown yet."""
        self._num_steps, self._first, self._shown = num_steps, step, shown
        self._start = self._line = time.monotonic()
        self._set_apart = set_apart
        self._bar: Progress | None = None
        if shown and console.is_terminal:
            self._bar = Progress(
                TextColumn("train"),
                BarColumn(bar_width=8),
                MofNCompleteColumn(),
                TextColumn("{task.fields[told]}"),
                console=console,
            )
            self._task = self._bar.add_task("train", total=num_steps, completed=step, told="")

    def __enter__(self) -> TrainingProgress:
        """Show the bar."""
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop updating the bar."""
        if self._bar is not None:
            self._bar.stop()

    def stepped(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Report a step: the number of steps done, its loss, the speed."""
        left = (time.monotonic() - self._start) / (step - self._first) * (self._num_steps - step)
        end = datetime.datetime.now() + datetime.timedelta(seconds=left)
        told = (
            f"loss {loss:.3f}, set apart {exponential(self._set_apart):.2f}, "
            f"{tokens_per_second:.0f} tokens/s, ends {end:%H:%M:%S}"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=step, told=told)
        elif time.monotonic() - self._line >= _SECONDS_BETWEEN_LINES:
            self._print(
                f"train: step {step} of {self._num_steps}, {told} "
                f"(in {datetime.timedelta(seconds=round(left))})"
            )

    def evaluated(self, step: int, loss: float, best: bool) -> None:
        """Report an evaluation on the examples set apart, with its loss in nats per token."""
        self._set_apart = loss
        self._print(
            f"train: step {step} of {self._num_steps}, perplexity on what is set apart "
            f"{exponential(loss):.2f}{', the best so far' if best else ''}"
        )

    def _print(self, line: str) -> None:
        if self._shown:
            self._line = time.monotonic()
            tell(line)
