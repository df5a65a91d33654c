"""The results of a comparison and their files: compare.json, compare.csv, scores.json, plans/."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from simdiff.comparison.plans import Cell, plan_name
from simdiff.errors import SimdiffError
from simdiff.evaluation.intervals import PerplexityInterval
from simdiff.io.json_files import header, read_json, write_json
from simdiff.io.kinds import COMPARISON_MARKER, FILES
from simdiff.io.outputs import write_bytes
from simdiff.planning.plan import PruningPlan
from simdiff.scoring.scores import LayerScores

SCHEMA = "simdiff.comparison"
CSV_COLUMNS = (
    "criterion",
    "num_removed",
    "removed",
    "perplexity",
    "perplexity_low",
    "perplexity_high",
    "ratio",
    "ratio_low",
    "ratio_high",
    "seconds_to_plan",
    "problem",
)


@dataclass(frozen=True)
class ComparedCell:
    """A cell with the quality of its plan; without one, `cell.problem` says why."""

    cell: Cell
    quality: PerplexityInterval | None
    problem: str | None

    @property
    def removed(self) -> tuple[int, ...]:
        """The layers that the plan removes, in order of depth."""
        return () if self.cell.plan is None else tuple(sorted(self.cell.plan.removed))

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "criterion": self.cell.criterion,
            "num_removed": self.cell.num_remove,
            "removed": list(self.removed),
            "plan": None if self.cell.plan is None else f"plans/{plan_name(self.cell)}",
            "quality": None if self.quality is None else asdict(self.quality),
            "seconds_to_plan": self.cell.seconds,
            "notes": [] if self.cell.plan is None else list(self.cell.plan.notes),
            "sweep": self.cell.sweep,
            "problem": self.problem,
        }


@dataclass(frozen=True)
class Comparison:
    """All cells, ordered by number of layers, then by criterion in the order of the options."""

    scores: LayerScores
    dense: PerplexityInterval
    cells: tuple[ComparedCell, ...]
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def criteria(self) -> tuple[str, ...]:
        """The criteria, in the order of the options."""
        return tuple(dict.fromkeys(entry.cell.criterion for entry in self.cells))

    @property
    def counts(self) -> tuple[int, ...]:
        """The numbers of removed layers."""
        return tuple(dict.fromkeys(entry.cell.num_remove for entry in self.cells))

    def at(self, criterion: str, num_remove: int) -> ComparedCell:
        """The cell of one criterion at one number of removed layers."""
        return next(
            entry
            for entry in self.cells
            if (entry.cell.criterion, entry.cell.num_remove) == (criterion, num_remove)
        )

    def to_dict(self) -> dict[str, Any]:
        """The content of compare.json."""
        return {
            **header(SCHEMA),
            **self.provenance,
            "dense": asdict(self.dense),
            "cells": [entry.to_dict() for entry in self.cells],
        }

    @classmethod
    def load(cls, directory: Path) -> Comparison:
        """Read the files that `save` wrote.

        Raises:
            SimdiffError: a file is missing, damaged, or of a newer version.
        """
        path = directory / COMPARISON_MARKER
        content = read_json(path, SCHEMA)
        scores = LayerScores.load(directory / "scores.json")
        try:
            cells = tuple(_cell(directory, cell) for cell in content["cells"])
            if not cells:
                raise ValueError("cells must not be empty")
            known = ("schema", "schema_version", "created", "dense", "cells", FILES)
            rest = {key: value for key, value in content.items() if key not in known}
            return cls(scores, PerplexityInterval(**content["dense"]), cells, rest)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, SimdiffError):
                raise
            raise SimdiffError(
                f"{path}: must be a complete comparison, but is damaged: "
                f"{type(error).__name__}: {error}"
            ) from None

    def to_csv(self) -> str:
        """The content of compare.csv: one row per cell, with the columns `CSV_COLUMNS`."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(CSV_COLUMNS)
        for entry in self.cells:
            quality = entry.quality
            writer.writerow(
                (
                    entry.cell.criterion,
                    entry.cell.num_remove,
                    " ".join(map(str, entry.removed)),
                    *(asdict(quality).values() if quality else [""] * 6),
                    round(entry.cell.seconds, 6),
                    entry.problem or "",
                )
            )
        return text.getvalue()

    def save(self, directory: Path) -> None:
        """Write compare.json, compare.csv, scores.json and plans/ into a directory."""
        write_json(directory / COMPARISON_MARKER, self.to_dict())
        write_bytes(directory / "compare.csv", self.to_csv().encode())
        self.scores.save(directory / "scores.json")
        (directory / "plans").mkdir()
        for entry in self.cells:
            if entry.cell.plan is not None:
                entry.cell.plan.save(directory / "plans" / plan_name(entry.cell))


def _cell(directory: Path, content: dict[str, Any]) -> ComparedCell:
    """A cell with its plan, which lies in a file of its own."""
    file, quality = content["plan"], content["quality"]
    plan = None if file is None else PruningPlan.load(directory / str(file))
    cell = Cell(
        str(content["criterion"]),
        int(content["num_removed"]),
        plan,
        float(content["seconds_to_plan"]),
        content["sweep"],
        content["problem"],
    )
    measured = None if quality is None else PerplexityInterval(**quality)
    return ComparedCell(cell, measured, content["problem"])
