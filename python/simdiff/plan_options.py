"""What a plan has to be, as a job is asked for it, and the plan that comes of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from simdiff.bootstrap import NUM_RESAMPLES, bootstrap_plan
from simdiff.budget import Budget
from simdiff.criteria import DEFAULT_ALPHA, DEFAULT_CRITERION, check_criterion
from simdiff.errors import SimdiffError
from simdiff.planning import check_planning, make_plan
from simdiff.progress import step
from simdiff.scores import LayerScores
from simdiff.search_plans import SEARCHED, needs_model, search
from simdiff.selection import PruningPlan, check_selection


@dataclass(frozen=True)
class PlanOptions:
    """Which layers may go, and how many."""

    criterion: str = DEFAULT_CRITERION
    alpha: float = DEFAULT_ALPHA
    budget: Budget = field(default_factory=Budget)
    protect: Collection[int] = field(default_factory=tuple)
    selection: str | None = None
    max_blocks: int | None = None
    random_seed: int = 0
    evaluation_windows: int = 4
    """Calibration windows that searches read, and those of the greedy search of which simdiff
    spends 1/50; 0 runs no search."""
    num_resamples: int = NUM_RESAMPLES
    """Of the calibration sequences, to tell how sure the plan is; 0 does not."""

    def count(self, model: Mapping[str, Any]) -> int:
        """How many layers go; refuses options that cannot be met, before any scoring.

        Args:
            model: of `model_identity`.
        """
        count = self.budget.layers(model)
        if self.criterion not in SEARCHED:
            check_criterion(self.criterion, self.alpha)
        check_planning(self.criterion, self.selection, self.max_blocks)
        check_selection(int(model["num_layers"]), count, self.protect)
        if self.num_resamples < 0:
            raise SimdiffError(f"bootstrap resamples must be 0 or more, got {self.num_resamples}")
        if self.evaluation_windows < 0:
            raise SimdiffError(
                f"evaluation windows must be 0 or more, got {self.evaluation_windows}"
            )
        if self.criterion in SEARCHED and self.evaluation_windows == 0:
            raise needs_model(self.criterion)
        return count

    def plan(
        self,
        scores: LayerScores,
        model: PreTrainedModel | None = None,
        windows: Tensor | None = None,
        journal: Path | None = None,
    ) -> PruningPlan:
        """The plan for these scores, and how sure it is where scores alone give one.

        Args:
            scores: with `sequences`, unless the latter may remain unknown.
            model, windows: the dense model and its calibration windows; searches need them, see
                `make_plan` for the others.
            journal: keeps the finished evaluations of a search, see `simdiff.search_plans.search`.
        """
        if model is None or windows is None or self.evaluation_windows == 0:
            model = windows = None
        else:
            windows = windows[: self.evaluation_windows]
        if self.criterion in SEARCHED:
            if model is None or windows is None:
                raise needs_model(self.criterion)
            return search(
                model,
                scores,
                windows,
                self.criterion,
                self.count(scores.model),
                protect=self.protect,
                journal=journal,
            )
        plan = self.first_plan(scores, model, windows)
        notes = [] if scores.stability is None else [str(scores.stability["note"])]
        confidence = None
        if self.num_resamples:
            with step(f"{self.num_resamples} bootstrap resamples"):
                confidence = bootstrap_plan(
                    scores, self.first_plan, num_resamples=self.num_resamples
                )
            if confidence is None:
                few = scores.sequences is not None
                notes.append(
                    "no bootstrap: the scores must hold two sequences or more apart, got "
                    + ("one group" if few else "none; score the model again for that")
                )
            else:
                notes.append(confidence.note(plan.removed))
        return replace(plan, confidence=confidence, notes=(*plan.notes, *notes))

    def first_plan(
        self,
        scores: LayerScores,
        model: PreTrainedModel | None = None,
        windows: Tensor | None = None,
    ) -> PruningPlan:
        """The plan alone; without a model, the one that scores alone give."""
        return make_plan(
            scores,
            self.count(scores.model),
            criterion=self.criterion,
            alpha=self.alpha,
            selection=self.selection,
            protect=self.protect,
            max_blocks=self.max_blocks,
            random_seed=self.random_seed,
            model=model,
            windows=windows,
        )
