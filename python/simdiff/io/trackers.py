"""Experiment trackers: what a run finds, in the place where its user keeps runs.

Nothing is sent unless a tracker is named. Each is one function that starts a run and returns a
`Tracker`; its library is imported there. Where a run goes is the library's own affair: its
environment variables (WANDB_PROJECT, MLFLOW_TRACKING_URI, TRACKIO_SPACE_ID) hold.
"""

from __future__ import annotations

import contextlib
import csv
import io
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from simdiff.errors import Note, SimdiffError
from simdiff.io import ranks

PROJECT = "simdiff"
"""Of a run, unless the environment names another one."""

Rows = Sequence[Sequence[Any]]


@dataclass(frozen=True)
class Tracker:
    """One started run of a tracker, as functions."""

    metrics: Callable[[Mapping[str, float], int | None], None]
    """Takes numbers by name, and the step where there are steps."""
    table: Callable[[str, Sequence[str], Rows], None]
    """Takes a name, the names of the columns, and rows."""
    file: Callable[[Path], None]
    """Attaches a file."""
    close: Callable[[bool], None]
    """Ends the run; True says that it failed."""


def _trackio(name: str, directory: Path, config: Mapping[str, Any]) -> Tracker:
    import trackio

    project = os.environ.get("TRACKIO_PROJECT", PROJECT)
    trackio.init(project=project, name=name, config=dict(config))

    def table(title: str, columns: Sequence[str], rows: Rows) -> None:
        data = [list(row) for row in rows]
        trackio.log({title: trackio.Table(columns=list(columns), data=data)})

    return Tracker(
        metrics=lambda values, step: trackio.log(dict(values), step=step),
        table=table,
        file=lambda path: trackio.log_artifact(str(path), name=_file_name(name, path), type="file"),
        close=lambda failed: trackio.finish(),
    )


def _wandb(name: str, directory: Path, config: Mapping[str, Any]) -> Tracker:
    import wandb

    project = os.environ.get("WANDB_PROJECT", PROJECT)
    run = wandb.init(project=project, name=name, config=dict(config))

    def table(title: str, columns: Sequence[str], rows: Rows) -> None:
        data = [list(row) for row in rows]
        run.log({title: wandb.Table(columns=list(columns), data=data)})

    return Tracker(
        metrics=lambda values, step: run.log(dict(values), step=step),
        table=table,
        file=lambda path: run.log_artifact(str(path), name=_file_name(name, path), type="file"),
        close=lambda failed: run.finish(exit_code=int(failed)),
    )


def _mlflow(name: str, directory: Path, config: Mapping[str, Any]) -> Tracker:
    import mlflow

    if not os.environ.keys() & {"MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"}:
        mlflow.set_experiment(PROJECT)
    mlflow.start_run(run_name=name)
    # A value may have 6000 characters.
    mlflow.log_params({key: str(value)[:6000] for key, value in config.items()})

    def table(title: str, columns: Sequence[str], rows: Rows) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([columns, *rows])
        mlflow.log_text(text.getvalue(), f"{title}.csv")

    return Tracker(
        metrics=lambda values, step: mlflow.log_metrics(dict(values), step=step),
        table=table,
        file=lambda path: mlflow.log_artifact(str(path)),
        close=lambda failed: mlflow.end_run("FAILED" if failed else "FINISHED"),
    )


def _tensorboard(name: str, directory: Path, config: Mapping[str, Any]) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(log_dir=str(directory.with_name(f"{directory.name}.tensorboard")))
    lines = (f"    {key}: {value}" for key, value in config.items())
    writer.add_text("config", "\n".join(lines))

    def metrics(values: Mapping[str, float], step: int | None) -> None:
        for key, value in values.items():
            writer.add_scalar(key, value, step)

    def table(title: str, columns: Sequence[str], rows: Rows) -> None:
        lines = [columns, ["---"] * len(columns), *rows]
        writer.add_text(title, "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines))

    return Tracker(
        metrics=metrics,
        table=table,
        file=lambda path: writer.add_text("files", str(path)),
        close=lambda failed: writer.close(),
    )


TRACKERS: dict[str, Callable[[str, Path, Mapping[str, Any]], Tracker]] = {
    "trackio": _trackio,
    "wandb": _wandb,
    "mlflow": _mlflow,
    "tensorboard": _tensorboard,
}


class Log:
    """What a job tells the trackers; one that fails on its way is left out, with a note."""

    def __init__(self, trackers: Mapping[str, Tracker]) -> None:
        """Take started trackers by their names."""
        self._trackers = dict(trackers)

    def metrics(self, values: Mapping[str, Any], step: int | None = None) -> None:
        """Tell numbers by name; what is no finite number is left out."""
        numbers = {
            key: value
            for key, value in values.items()
            if isinstance(value, (int, float)) and math.isfinite(value)
        }
        if numbers:
            self._each(lambda tracker: tracker.metrics(numbers, step))

    def table(self, name: str, columns: Sequence[str], rows: Rows) -> None:
        """Tell a table."""
        self._each(lambda tracker: tracker.table(name, columns, rows))

    def file(self, path: Path) -> None:
        """Attach a file, where there is one."""
        if path.is_file():
            self._each(lambda tracker: tracker.file(path))

    def close(self, failed: bool) -> None:
        """End the runs."""
        self._each(lambda tracker: tracker.close(failed))

    def _each(self, tell: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                with _off_standard_output():
                    tell(tracker)
            except Exception as error:  # hours of work do not end for want of a network
                del self._trackers[name]
                warnings.warn(f"{name} takes nothing more: {_said(error)}", Note, stacklevel=3)


@contextlib.contextmanager
def tracked(names: Sequence[str], directory: Path, config: Mapping[str, Any]) -> Iterator[Log]:
    """Start a run of each tracker, and end it with the body.

    Args:
        names: keys of `TRACKERS`; none start nothing.
        directory: of the output, whose name is that of the run.
        config: options of the command.

    Raises:
        SimdiffError: a tracker is unknown or not installed, or its run cannot be started.
    """
    started: dict[str, Tracker] = {}
    log = Log(started)
    try:
        for name in dict.fromkeys(names) if ranks.prints() else ():
            started[name] = _start(name, directory.absolute(), config)
        log = Log(started)
        yield log
    except BaseException:
        Log(started).close(True)
        raise
    log.close(False)


@contextlib.contextmanager
def logged(log: Log | Sequence[str], directory: Path, config: Mapping[str, Any]) -> Iterator[Log]:
    """A `Log` as it is, or names of trackers as a started one, see `tracked`."""
    if isinstance(log, Log):
        yield log
        return
    with tracked(log, directory, config) as started:
        yield started


def check_tracker(name: str) -> None:
    """Refuse a name that is of no tracker.

    Raises:
        SimdiffError: see there.
    """
    if name not in TRACKERS:
        raise SimdiffError(f"log=... must be of {', '.join(TRACKERS)}, got {name!r}")


def _start(name: str, directory: Path, config: Mapping[str, Any]) -> Tracker:
    check_tracker(name)
    try:
        with _off_standard_output():
            return TRACKERS[name](directory.name, directory, config)
    except ImportError as error:
        raise SimdiffError(
            f"log={name} needs {name}, which is not installed ({error.name}): "
            f'pip install "simdiff-kernels[{name}]"'
        ) from None
    except Exception as error:  # of a library that asks for a key, a server or a network
        raise SimdiffError(
            f"log={name}: a run cannot be started: {_said(error)}; {_ADVICE[name]}"
        ) from None


def _off_standard_output() -> contextlib.redirect_stdout[TextIO]:
    """Where a library tells of itself: not among the results, which may be JSON."""
    return contextlib.redirect_stdout(sys.stderr)


_ADVICE = {
    "trackio": "a Space needs `hf auth login`, this machine needs no key",
    "wandb": "`wandb login` gives it a key, WANDB_MODE=offline needs none",
    "mlflow": "MLFLOW_TRACKING_URI says where it goes, MLFLOW_TRACKING_TOKEN is its key",
    "tensorboard": "it writes files beside the output",
}


def _said(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__).rstrip(".")


def _file_name(run: str, path: Path) -> str:
    """A name for an attached file: letters, digits, dots, dashes."""
    words = f"{run}-{path.name}"
    return "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in words)
