"""Steps in their order within a bound of time, and a record that is on disk after each result."""

from __future__ import annotations

import itertools
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Result = dict[str, Any]
"""What was measured, for JSON; `part` tells what of, `case` which."""


class LeftOutError(Exception):
    """A step cannot run here, or not in the time that is left; the message says why."""


class OutOfTimeError(BaseException):
    """The time is over; no `except Exception` on the way may swallow it."""


@dataclass(frozen=True)
class Settings:
    """Where and how much: on a GPU all of it, with `quick` tiny cases on any machine."""

    device: str
    quick: bool
    backends: tuple[str, ...]
    """Those of ours that run on the device, the fastest first."""


@dataclass(frozen=True)
class Step:
    """Some results; `run` is given how to ask for the seconds that are left."""

    part: str
    case: str
    seconds: float
    """About what it takes on a fresh H200, compilation included; with less left it is left out."""
    run: Callable[[Callable[[], float]], Iterable[Result]]
    timed: bool = True
    """Whether times are what it tells; steps that tell none run at once where they follow."""


class Record:
    """Everything so far, in PATH.json and, for people, PATH.md; both are whole at any moment."""

    def __init__(self, path: Path, machine: Result, table: Callable[[Result], str]) -> None:
        """Nothing is written before the first result."""
        self.content: Result = {**machine, "results": [], "left_out": []}
        self._path, self._table = path, table
        self._lock = threading.RLock()

    def go_on(self, again: Collection[str]) -> None:
        """Keep what the file has, but for the parts in `again`.

        Raises:
            ValueError: the file is of another machine, commit or set of versions.
        """
        found = json.loads(self._path.with_suffix(".json").read_text())
        same = [key for key in self.content if key not in ("results", "left_out")]
        other = [key for key in same if found.get(key) != json.loads(json.dumps(self.content[key]))]
        if other:
            raise ValueError(f"{self._path}.json is of another run: {', '.join(other)} differ")
        for key in ("results", "left_out"):
            self.content[key] = [entry for entry in found[key] if entry["part"] not in again]

    def add(self, step: Step, seconds: float, result: Result) -> None:
        """Keep one result and say so."""
        entry = {"part": step.part, "case": step.case, **result, "took_seconds": seconds}
        with self._lock:
            self.content["results"].append(entry)
            self._save(f"{entry['part']}, {entry['case']}: {seconds:.1f} s")

    def leave_out(self, step: Step, why: str) -> None:
        """Name what is not measured."""
        with self._lock:
            self.content["left_out"].append({"part": step.part, "case": step.case, "why": why})
            self._save(f"{step.part}, {step.case}: left out: {why}")

    def finish(self, seconds: float) -> None:
        """All steps were gone through."""
        self.content["complete"], self.content["seconds"] = True, seconds
        self._save(f"{seconds:.0f} s in all")

    def _save(self, message: str) -> None:
        print(message, file=sys.stderr, flush=True)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        _replace(self._path.with_suffix(".json"), json.dumps(self.content, indent=1) + "\n")
        _replace(self._path.with_suffix(".md"), self._table(self.content))


def _replace(path: Path, text: str) -> None:
    """Write a file that is, whenever the process is killed, the old one or the new one."""
    scratch = path.with_name(f"{path.name}.{os.getpid()}")
    scratch.write_text(text)
    scratch.replace(path)


def run_all(steps: Sequence[Step], record: Record, end: float) -> None:
    """Run what fits until `end` of the monotonic clock; a step that fails does not stop others."""
    for timed, group in itertools.groupby(steps, key=lambda step: step.timed):
        if timed:
            for step in group:
                _run(step, record, end)
            continue
        threads = [threading.Thread(target=_run, args=(step, record, end)) for step in group]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except OutOfTimeError:  # their programs end in time by themselves
            for thread in threads:
                thread.join()
            raise


def _run(step: Step, record: Record, end: float) -> None:
    left = end - time.monotonic()
    if left < step.seconds:
        record.leave_out(step, f"it takes about {step.seconds:.0f} s, {max(left, 0):.0f} left")
        return
    try:
        for seconds, result in _timed(step.run(lambda: end - time.monotonic())):
            record.add(step, seconds, result)
    except LeftOutError as reason:
        record.leave_out(step, str(reason))
    except OutOfTimeError:
        record.leave_out(step, "the time was over before it ended")
    except Exception as error:
        traceback.print_exc()
        record.add(step, 0.0, {"failed": f"{type(error).__name__}: {error}"[:2000]})


def _timed(results: Iterable[Result]) -> Iterator[tuple[float, Result]]:
    start = time.monotonic()
    for result in results:
        now = time.monotonic()
        yield now - start, result
        start = now
