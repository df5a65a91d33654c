"""Make the plans of a comparison and measure the time that each takes."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from simdiff.errors import SimdiffError, number_of
from simdiff.evaluation.journal import Evaluation, EvaluationJournal
from simdiff.evaluation.streamed_losses import kinds_of
from simdiff.io import ranks
from simdiff.io.json_files import check_key, header, read_json, write_json
from simdiff.models.streamed import stream_of
from simdiff.planning.bypass import BypassEvaluator
from simdiff.planning.make_plan import make_plan
from simdiff.planning.names import SEARCHED, SEARCHES
from simdiff.planning.plan import PruningPlan
from simdiff.planning.searched_criteria import searched_plan
from simdiff.planning.streamed_search import StreamedEvaluator
from simdiff.scoring.scores import LayerScores

SCHEMA = "simdiff.comparison-cells"

# Criteria that depend only on the number of layers.
_WITHOUT_SCORES = ("last-n", "random")


@dataclass(frozen=True)
class Cell:
    """The plan of one criterion at one number of removed layers."""

    criterion: str
    num_remove: int
    plan: PruningPlan | None
    seconds: float
    """Time from the dense model in memory to the plan; evaluations read from the journal count with
    the time they took. A pass over a streamed model reads windows for many plans, and each counts
    with its share of the pass."""
    sweep: dict[str, Any] | None = None
    """The perplexity over alpha, for a criterion that sweeps it."""
    problem: str | None = None
    """Says why there is no plan, or why it could not be measured; None if all is well."""


class Planner:
    """Makes the plan of a cell and measures the time it takes.

    Args:
        model: the dense model.
        scores: scores of the calibration pass, which took `scoring_seconds`.
        windows: token ids of the calibration text on which searches and sweeps evaluate.
        choice_windows: token ids of the windows on which `simdiff` chooses among a few plans; None
            takes the first plan.
        evaluate: journal of evaluations of the model without layers on `windows`.
        evaluator: computes the evaluations that are not in `evaluate`.
        calibration: token ids of all calibration windows, for efforts that read more of them.
        effort: see `make_plan`.
        alpha, protect, random_seed: see `make_plan`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        scores: LayerScores,
        scoring_seconds: float,
        windows: Tensor,
        choice_windows: Tensor | None,
        evaluate: EvaluationJournal,
        evaluator: BypassEvaluator | StreamedEvaluator,
        *,
        calibration: Tensor,
        effort: str | None,
        alpha: float,
        protect: Collection[int],
        random_seed: int,
    ) -> None:
        """Store the arguments; nothing runs yet."""
        self._model, self._scores, self._scoring_seconds = model, scores, scoring_seconds
        self._windows, self._choice_windows = windows, choice_windows
        self._evaluate, self._evaluator = evaluate, evaluator
        self._calibration, self._effort = calibration, effort
        self._alpha, self._protect, self._random_seed = alpha, protect, random_seed
        self._in_evaluations = 0.0
        self._charged: dict[frozenset[int], float] = {}

    def cell(self, criterion: str, num_remove: int) -> Cell:
        """Make the plan of one cell; its `problem` tells an impossible selection."""
        self._in_evaluations, self._charged = 0.0, {}
        for read in kinds_of(self._model):
            read.asked.clear()
        start = time.perf_counter()
        plan, sweep, problem = None, None, None
        try:
            plan, sweep = self._plan(criterion, num_remove)
            plan = self._with_windows(plan)
        except SimdiffError as error:
            problem = str(error)
        seconds = time.perf_counter() - start - self._in_evaluations + sum(self._charged.values())
        if criterion not in (*_WITHOUT_SCORES, *SEARCHES):
            seconds += self._scoring_seconds
        if criterion not in SEARCHED:  # those are charged by the journal
            reads = kinds_of(self._model)
            seconds += sum(read.seconds(*one) for read in reads for one in read.asked)
        return Cell(criterion, num_remove, plan, seconds, sweep, problem)

    def _plan(self, criterion: str, count: int) -> tuple[PruningPlan, dict[str, Any] | None]:
        scores, protect = self._scores, self._protect
        if criterion in SEARCHED:
            return searched_plan(
                scores,
                criterion,
                count,
                self._timed,
                self._evaluator.rebase,
                protect,
                None if stream_of(self._model) is not None else self._timed_ahead,
            )
        plan = make_plan(
            scores,
            count,
            criterion=criterion,
            alpha=self._alpha,
            protect=protect,
            random_seed=self._random_seed,
            model=None if self._choice_windows is None else self._model,
            windows=None if self._choice_windows is None else self._calibration,
            effort=self._effort,
            evaluation_windows=None if self._choice_windows is None else len(self._choice_windows),
        )
        return plan, None

    def _with_windows(self, plan: PruningPlan) -> PruningPlan:
        """Add to a plan the windows on which it was evaluated, if it was."""
        windows = self._windows if self._charged else self._choice_windows
        if windows is None or plan.search or not (self._charged or plan.candidates):
            return plan
        note = f"evaluated on the first {number_of(len(windows), 'window')} of the calibration text"
        return replace(plan, notes=(*plan.notes, note))

    def _timed(self, removed: frozenset[int]) -> Evaluation:
        start = time.perf_counter()
        found = self._evaluate(removed)
        self._in_evaluations += time.perf_counter() - start
        self._charged[removed] = found.seconds
        return found

    def _timed_ahead(self, sets: Sequence[frozenset[int]]) -> None:
        start = time.perf_counter()
        self._evaluate.ahead(sets)
        self._in_evaluations += time.perf_counter() - start


class CellJournal:
    """Stores finished cells, each before the next one begins.

    Args:
        folder: directory of cells.json and one file for each plan.
        key: everything the plans depend on.

    Raises:
        SimdiffError: the folder was made with another key, or is damaged.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any]) -> None:
        """Read the cells in the folder."""
        self._folder, self._key = folder, dict(key)
        self.cells: dict[tuple[str, int], Cell] = ranks.first(self._load)

    def _load(self) -> dict[tuple[str, int], Cell]:
        cells: dict[tuple[str, int], Cell] = {}
        if not self._path.exists():
            return cells
        content = read_json(self._path, SCHEMA)
        check_key(self._path, content.get("key"), self._key)
        try:
            for entry in content["cells"]:
                fields = {**entry, "plan": None}
                cell = Cell(**fields)
                if entry["plan"] is not None:
                    plan = PruningPlan.load(self._folder / entry["plan"])
                    cell = Cell(**{**fields, "plan": plan})
                cells[cell.criterion, cell.num_remove] = cell
        except (KeyError, TypeError, ValueError) as error:
            raise SimdiffError(
                f"{self._path}: must hold finished cells, but is damaged: "
                f"{type(error).__name__}: {error}"
            ) from None
        return cells

    @property
    def _path(self) -> Path:
        return self._folder / "cells.json"

    def add(self, cell: Cell) -> None:
        """Write a finished cell: its plan, then the list that names it."""
        self.cells[cell.criterion, cell.num_remove] = cell
        if cell.plan is not None:
            cell.plan.save(self._folder / plan_name(cell))
        entries = [
            {**vars(entry), "plan": None if entry.plan is None else plan_name(entry)}
            for entry in self.cells.values()
        ]
        content = {**header(SCHEMA), "key": self._key, "cells": entries}
        write_json(self._path, content)


def plan_name(cell: Cell) -> str:
    """The name of the file for the plan of a cell."""
    return f"{cell.criterion}-{cell.num_remove}.json"
