"""The losses of a training as it goes: a JSON Lines file, and whoever else wants to know."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Told = Callable[[Mapping[str, Any], int], None]
"""Takes numbers by name, and the step that they are of."""


@dataclass(frozen=True)
class LossLog:
    """Where losses go: a line is of a step, or of an evaluation on what is set apart."""

    path: Path | None = None
    """The file; None writes none."""
    told: Told | None = None

    def begin(self, step: int | None) -> None:
        """Begin anew, or keep what was written up to a step from which a training goes on."""
        if self.path is None:
            return
        old = "" if step is None or not self.path.is_file() else self.path.read_text()
        kept = [line for line in old.splitlines() if step is not None and _step(line) <= step]
        self.path.write_text("".join(f"{line}\n" for line in kept))

    def add(self, step: int, **values: float | None) -> None:
        """Tell the values of a step."""
        known = {name: value for name, value in values.items() if value is not None}
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, **known}) + "\n")
        if self.told is not None:
            self.told({f"train/{name}": value for name, value in known.items()}, step)


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (KeyError, TypeError, ValueError):  # a line that a killed process left unfinished
        return float("inf")
