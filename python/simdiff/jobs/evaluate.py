"""A model as it is and with a plan applied in memory: `simdiff eval MODEL --plan plan.json`."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from simdiff.evaluation.quality import Loaded, Subject
from simdiff.evaluation.streamed_tasks import TaskAnswers
from simdiff.evaluation.tasks import run_tasks
from simdiff.evaluation.text_perplexity import TokenizedText, sums_of_plans
from simdiff.jobs.plans import check_depth, fitted
from simdiff.models.layer_indices import spans
from simdiff.models.loading import load_model
from simdiff.models.streamed import StreamOptions, stream_of
from simdiff.models.sweep import WHOLE, refuse_streamed, remove_states
from simdiff.planning.plan import PruningPlan
from simdiff.sublayers.any_plan import cut_in_memory, load_any_plan

if TYPE_CHECKING:
    from simdiff.sublayers.plan import SublayerPlan


def with_plan(
    name: str,
    plan: Path | Collection[int],
    *,
    dtype: str = "auto",
    device: str | None = None,
    stream: StreamOptions | None = None,
) -> tuple[list[Subject], list[str]]:
    """Two subjects on one copy of the weights: a model, and the same with a plan applied.

    Args:
        name: of the model that the plan was made for.
        plan: the file of one, of layers or of sub-layers; or the layers.
        dtype, device, stream: see `load_model`.

    Returns:
        The subjects for `evaluate_models`, and what the plan removes.

    Raises:
        SimdiffError: no such plan, one for another model, or one that the model cannot express.
    """
    found = load_any_plan(plan) if isinstance(plan, Path) else PruningPlan(tuple(plan))
    what = str(plan) if isinstance(plan, Path) else f"without layers {spans(plan)}"
    if isinstance(found, PruningPlan):
        check_depth(found, name)
    model, tokenizer = load_model(name, dtype=dtype, device=device, stream=stream)
    if isinstance(found, PruningPlan):
        found = fitted(found, model, name)
    with cut_in_memory(model, found):  # refused before anything is read
        pass

    dense = Subject.given(model, tokenizer, name)
    pruned = cut_subject(f"{name}, {what}", model, tokenizer, found)
    if not isinstance(found, PruningPlan):
        refuse_streamed(model, "a plan of sub-layers", "evaluate it on a machine that holds it")
    elif stream_of(model) is not None:
        dense, pruned = _in_one_pass(dense, pruned, frozenset(found.removed))
    return [dense, pruned], [str(unit) for unit in found.removed]


def cut_subject(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: PruningPlan | SublayerPlan,
) -> Subject:
    """A model in memory with a plan applied while it is evaluated; no weight is copied."""

    @contextlib.contextmanager
    def opened() -> Iterator[Loaded]:
        with cut_in_memory(model, plan):
            yield model, tokenizer
        remove_states(model)

    known = {}
    if isinstance(plan, PruningPlan):
        known = {"removed": sorted(plan.removed), "cut_from": plan.model.get("fingerprint")}
        if plan.model.get("weights"):
            known["cut_from_weights"] = plan.model["weights"]
    return Subject(name, opened, known)


def _in_one_pass(
    dense: Subject, pruned: Subject, removed: frozenset[int]
) -> tuple[Subject, Subject]:
    """Two subjects on a streamed model, of which the first one's turn serves the second too."""
    found: dict[frozenset[int], list[tuple[float, int]]] = {}

    def both(
        model: PreTrainedModel, text: TokenizedText, *, description: str
    ) -> list[tuple[float, int]]:
        found.update(sums_of_plans(model, text, [WHOLE, removed], description="perplexities"))
        return found[WHOLE]

    def known(*_: object, description: str) -> list[tuple[float, int]]:
        return found[removed]

    answers = TaskAnswers([WHOLE, removed])
    return (
        replace(dense, sums=both, tasks=partial(run_tasks, answers=answers)),
        replace(pruned, sums=known, tasks=partial(run_tasks, answers=answers, plan=removed)),
    )
