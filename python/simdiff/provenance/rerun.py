"""What differs between an output and the one that its config.yaml gave again."""

from __future__ import annotations

import filecmp
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from simdiff.errors import SimdiffError
from simdiff.io.json_files import load_json
from simdiff.io.kinds import COMPARISON_MARKER, CONFIG, DIRECTORY_COMMANDS, PLAN_FILE, RESULTS_FILE
from simdiff.recovery.record import RECORD

RECORDS = (PLAN_FILE, "scores.json", RESULTS_FILE, RECORD, COMPARISON_MARKER)
"""The JSON files of outputs, as far as an output has them."""

# The first part of a path, and what it tells of; all else is a result.
_CIRCUMSTANCES = {
    "versions": "version",
    "machine": "machine",
    "calibration": "text",
    "evaluation": "text",
    "model": "model",
}
# Measured anew each time, or the words for what other entries tell.
_NO_RESULTS = re.compile(r"(^|\.)(created|speed|notes)(\.|$)|seconds")
_SHORT = 60
_COMMANDS = ", ".join(DIRECTORY_COMMANDS)


@dataclass(frozen=True)
class Rerun:
    """Two outputs of one command, compared entry by entry; times are left out."""

    circumstances: dict[str, str] = field(default_factory=dict)
    """What differs in versions, machine, text and model, by its name: `then, now`."""
    results: dict[str, str] = field(default_factory=dict)
    """What differs in plans, numbers and weights, by file and name."""

    @property
    def same(self) -> bool:
        """Whether every number, plan and weight is the same."""
        return not self.results

    def lines(self) -> list[str]:
        """What differs, for people."""
        told = [f"Today differs {name}: {text}" for name, text in self.circumstances.items()]
        if not told:
            told = ["Versions, machine, text and model are as they were."]
        if self.same:
            return [*told, "Every plan, number and weight is the same."]
        return [*told, *(f"Result differs: {name}: {text}" for name, text in self.results.items())]


def command_of(directory: Path) -> str:
    """The command whose config.yaml lies in an output.

    Raises:
        SimdiffError: there is none, or it is of a command that writes no directory.
    """
    import yaml

    path = directory / CONFIG
    if not path.is_file():
        raise SimdiffError(
            f"{directory}: must hold the {CONFIG} that {_COMMANDS} write into their output, and "
            "has none"
        )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise SimdiffError(f"{path}: must be a YAML file, but is not: {error}") from None
    command = content.get("command") if isinstance(content, dict) else None
    if command not in DIRECTORY_COMMANDS:
        raise SimdiffError(f"{path}: must name its command, one of {_COMMANDS}, got {command!r}")
    return str(command)


def compared(then: Path, now: Path) -> Rerun:
    """Compare two outputs of one command.

    Args:
        then, now: directories of the earlier and of the later output.

    Raises:
        SimdiffError: a file of results cannot be read.
    """
    found = Rerun()
    for name in RECORDS:
        if not ((then / name).is_file() and (now / name).is_file()):
            if (then / name).is_file() != (now / name).is_file():
                found.results[name] = "is in one of them alone"
            continue
        before, after = (dict(_flat(load_json(folder / name))) for folder in (then, now))
        for key in dict.fromkeys((*before, *after)):
            if _NO_RESULTS.search(key) or before.get(key) == after.get(key):
                continue
            text = _difference(before.get(key), after.get(key))
            kind = _CIRCUMSTANCES.get(key.partition(".")[0])
            if kind is None:
                found.results[f"{name}, {key}"] = text
            else:
                found.circumstances[f"the {kind} ({key})"] = text
    for path in sorted(then.rglob("*.safetensors")):
        other = now / path.relative_to(then)
        if not other.is_file() or not filecmp.cmp(path, other, shallow=False):
            found.results[str(path.relative_to(then))] = "other weights"
    return found


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The entries of nested objects by their paths; lists of numbers are entries, others are not.

    A list of objects, such as the cells of a comparison, is numbered.
    """
    items: Mapping[Any, Any] = {}
    if isinstance(value, list) and any(isinstance(entry, dict) for entry in value):
        items = dict(enumerate(value))
    elif isinstance(value, dict):
        items = value
    else:
        yield prefix, value
    for key, entry in items.items():
        yield from _flat(entry, f"{prefix}.{key}" if prefix else str(key))


def _difference(then: Any, now: Any) -> str:
    """Two values in words; of numbers how far they are apart."""
    pairs = list(zip(*map(_numbers, (then, now)), strict=False))
    apart = [abs(one - other) / max(abs(one), abs(other)) for one, other in pairs if one != other]
    if apart and len(_numbers(then)) == len(_numbers(now)) == len(pairs) > 1:
        return f"{len(apart)} of {len(pairs)} numbers, by at most {100 * max(apart):.2g} %"
    return f"{_shown(then)} then, {_shown(now)} now"


def _numbers(value: Any) -> list[float]:
    """The numbers in nested lists of floats; none in others."""
    if isinstance(value, list):
        return [number for entry in value for number in _numbers(entry)]
    return [value] if isinstance(value, float) else []


def _shown(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= _SHORT else f"{text[:_SHORT]}..."
