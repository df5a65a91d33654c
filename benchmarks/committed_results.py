"""The committed results and where they come from, and Markdown made of them."""

from __future__ import annotations

import csv
import json
import textwrap
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import effort_tables
import quality_tables

ROOT = Path(__file__).resolve().parents[1]
MACHINE = "epyc-2-cores"


class Results:
    """The files of a folder of results.

    Every method raises SystemExit with the name of a file that is missing.
    """

    def __init__(self, folder: Path = ROOT / "benchmarks" / "results") -> None:
        self.folder = folder

    def _text(self, name: str) -> str:
        try:
            return (self.folder / name).read_text()
        except OSError as error:
            raise SystemExit(f"figures: results must hold {name}: {error.strerror}") from None

    def json(self, stem: str) -> Any:
        return json.loads(self._text(f"{stem}.json"))

    def rows(self, stem: str) -> list[dict[str, str]]:
        return list(csv.DictReader(self._text(f"{stem}.csv").splitlines()))

    @cached_property
    def manifest(self) -> dict[str, dict[str, Any]]:
        content: dict[str, dict[str, Any]] = self.json("manifest")["results"]
        return content

    def origin(self, *names: str) -> str:
        """In brackets: command, machine and commit of the first file, links to all."""
        missing = [name for name in names if name not in self.manifest]
        if missing:
            raise SystemExit(f"figures: manifest.json must have an entry for {missing[0]}")
        entry = self.manifest[names[0]]
        commit = entry["commit"][:7] + ("" if entry["clean"] is not False else " with changes")
        links = ", ".join(f"[{name}](../benchmarks/results/{name})" for name in names)
        alike = len({self.manifest[name]["command"] for name in names}) > 1
        command = f"`{entry['command']}`" + (" and alike" if alike else "")
        return f"({command}; {entry['machine']}; commit {commit}; {links})"

    @cached_property
    def quality(self) -> list[quality_tables.Subject]:
        return quality_tables.load(self.folder, "quality")

    @cached_property
    def effort(self) -> list[quality_tables.Subject]:
        return effort_tables.load(self.folder, self.quality)

    @cached_property
    def calibration(self) -> dict[str, Any]:
        """What calibration_study.py wrote, by file name."""
        files = sorted(self.folder.glob("calibration-*.json"))
        return {path.name: json.loads(path.read_text()) for path in files}

    @cached_property
    def development(self) -> list[quality_tables.Subject]:
        return quality_tables.load(self.folder, "development")


def paragraph(*sentences: str) -> str:
    """Wrapped where it may be, a link or a command may not."""
    text = " ".join(sentence for sentence in sentences if sentence)
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)


def lines(rows: Sequence[str]) -> str:
    return "\n".join(rows)


def joined(*parts: str) -> str:
    """Paragraphs, tables and heads, those that are empty left out."""
    return "\n\n".join(part for part in parts if part)


def extent(values: Sequence[float], decimals: int = 0) -> str:
    """The least and the largest."""
    return f"{min(values):.{decimals}f} to {max(values):.{decimals}f}".replace("-", "−")
