"""PlanOptions: the user's wishes for a plan (criterion, budget, protected layers) and the function
that makes the plan from them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simdiff.errors import SimdiffError
from simdiff.io.progress import step
from simdiff.planning.bootstrap import bootstrap_plan
from simdiff.planning.budget import Budget
from simdiff.planning.criteria import check_criterion
from simdiff.planning.drawn_plans import PlanOfScores
from simdiff.planning.make_plan import (
    check_effort,
    check_planning,
    default_selection,
    make_plan,
)
from simdiff.planning.names import (
    DEFAULT_ALPHA,
    DEFAULT_CRITERION,
    NUM_RESAMPLES,
    SEARCHED,
    WEIGHED,
)
from simdiff.planning.plan import PruningPlan
from simdiff.planning.selection import check_selection
from simdiff.scoring.scores import LayerScores

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class PlanOptions:
    """The user's wishes for a plan: how many layers to remove, which not, and by what criterion."""

    criterion: str = DEFAULT_CRITERION
    alpha: float = DEFAULT_ALPHA
    budget: Budget = field(default_factory=Budget)
    protect: Collection[int] = field(default_factory=tuple)
    selection: str | None = None
    max_blocks: int | None = None
    random_seed: int = 0
    evaluation_windows: int = 4
    """Number of calibration windows for searches; what `simdiff` may spend is a share of what
    greedy search would read on them. 0 runs no search."""
    effort: str | None = None
    """How much `simdiff` may spend, see `make_plan`."""
    bootstrap: int = NUM_RESAMPLES
    """Number of bootstrap draws of the calibration sequences for the plan's confidence; 0 skips
    it."""

    def count(self, model: Mapping[str, Any]) -> int:
        """The number of layers to remove; refuses impossible options before any scoring.

        Args:
            model: identity of the model, see `model_identity`.
        """
        count = self.budget.layers(model)
        if self.criterion not in SEARCHED:
            check_criterion(self.criterion, self.alpha)
        if self.alpha != DEFAULT_ALPHA and self.criterion not in WEIGHED:
            raise SimdiffError(
                f"alpha has an effect only with a criterion that weighs by it "
                f"({', '.join(WEIGHED)}), got {self.alpha} with {self.criterion}"
            )
        check_planning(self.criterion, self.selection, self.max_blocks)
        check_effort(self.effort)
        check_selection(int(model["num_layers"]), count, self.protect)
        if self.bootstrap < 0:
            raise SimdiffError(f"bootstrap resamples must be 0 or more, got {self.bootstrap}")
        if self.evaluation_windows < 0:
            raise SimdiffError(
                f"evaluation windows must be 0 or more, got {self.evaluation_windows}"
            )
        if self.criterion in SEARCHED and self.evaluation_windows == 0:
            raise _needs_model(self.criterion)
        return count

    def plan(
        self,
        scores: LayerScores,
        model: PreTrainedModel | None = None,
        windows: Tensor | None = None,
        journal: Path | None = None,
    ) -> PruningPlan:
        """Make the plan for scores, with its confidence if scores alone give a plan.

        Args:
            scores: scores; the confidence needs their `sequences`.
            model, windows: the dense model and its calibration windows; searches need them, see
                `make_plan` for the other criteria.
            journal: file of a search's finished evaluations, see
                `simdiff.planning.searched_criteria.search_plan`.
        """
        if model is None or windows is None or self.evaluation_windows == 0:
            model = windows = None
        if self.criterion in SEARCHED:
            if model is None or windows is None:
                raise _needs_model(self.criterion)
            windows = windows[: self.evaluation_windows]
            # Imported here: a plan of scores alone needs no torch.
            from simdiff.evaluation.streamed_losses import in_few_passes
            from simdiff.planning.searched_criteria import search_plan

            found = in_few_passes(
                model,
                partial(
                    search_plan,
                    model,
                    scores,
                    windows,
                    self.criterion,
                    self.count(scores.model),
                    protect=self.protect,
                    journal=journal,
                ),
            )
            return replace(found, asked=self.budget.asked)
        if model is None:
            plan = self.first_plan(scores)
        else:
            from simdiff.evaluation.streamed_losses import in_few_passes

            plan = in_few_passes(model, partial(self.first_plan, scores, model, windows, journal))
        notes = [] if scores.stability is None else [str(scores.stability["note"])]
        confidence = None
        if self.bootstrap:
            with step(f"{self.bootstrap} bootstrap resamples"):
                confidence = bootstrap_plan(scores, self.first_plan, num_resamples=self.bootstrap)
            if confidence is None:
                few = scores.sequences is not None
                notes.append(
                    "no bootstrap: the scores must hold two sequences or more apart, got "
                    + ("one group" if few else "none; score the model again for that")
                )
            else:
                notes.append(confidence.note(plan.removed))
        return replace(
            plan,
            confidence=confidence,
            notes=(*plan.notes, *notes),
            asked=self.budget.asked,
        )

    @property
    def of_scores(self) -> PlanOfScores:
        """`first_plan` without a model, which makes the plans of many draws at once."""
        selection = self.selection or default_selection(self.criterion)
        return PlanOfScores(self.first_plan, self.criterion, selection, self.max_blocks)

    def first_plan(
        self,
        scores: LayerScores,
        model: PreTrainedModel | None = None,
        windows: Tensor | None = None,
        journal: Path | None = None,
    ) -> PruningPlan:
        """Make the plan without its confidence; without a model, from scores alone."""
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
            effort=self.effort,
            evaluation_windows=self.evaluation_windows,
            journal=journal,
        )


def _needs_model(criterion: str) -> SimdiffError:
    """The error for a search without a model."""
    return SimdiffError(
        f"criterion {criterion} evaluates the model without layers on calibration text: give the "
        "model of the scores too (model=...) and at least one evaluation window"
    )


def search_journal(output: Path) -> Path:
    """Where the evaluations of a search are kept until its output is written."""
    output = output.absolute()
    return output.with_name(output.name + ".search.json")
