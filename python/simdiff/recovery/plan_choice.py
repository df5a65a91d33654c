"""Choose among the plans of a search by the loss after their repair, not after the plain cut.

What a cut costs and what of it comes back are different things: of two plans the one that is worse
after the plain cut may be the better one once it is repaired. Each of the few best plans that the
search evaluated is repaired in closed form; the loss on the calibration windows that the repair was
not fitted to decides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from simdiff.errors import SimdiffError
from simdiff.io.progress import tell
from simdiff.planning.plan import PruningPlan
from simdiff.recovery.closed_form.method import recover
from simdiff.surgery.copies import sharing_copy


@dataclass(frozen=True)
class RepairedPlan:
    """A plan of the search with its loss before and after its repair."""

    removed: tuple[int, ...]
    plain_nll: float | None
    """Mean loss per token of the plain cut on the windows that decide."""
    nll: float | None
    """That of the repaired model; None if the plan cannot be cut or repaired."""
    note: str = ""


def choose_repaired(
    model: PreTrainedModel, plan: PruningPlan, windows: Tensor, count: int, batch_size: int
) -> tuple[PruningPlan, list[dict[str, Any]]]:
    """The plan of lowest loss after its repair, and what was tried.

    Args:
        model: the dense model, which is not changed.
        plan: of a search; it is tried, and the best others that the search evaluated.
        windows: calibration token ids `(num_windows, window_length)`.
        count: how many plans are tried, at least 2.
        batch_size: windows per forward.

    Raises:
        SimdiffError: the plan holds no other plans, or none can be repaired.
    """
    plans = plans_to_try(plan, count)
    found = []
    for number, removed in enumerate(plans):
        found.append(_repaired(model, replace(plan, removed=removed), windows, batch_size))
        after = "none" if found[-1].nll is None else f"{found[-1].nll:.4f}"
        tell(f"plan {number + 1} of {len(plans)}: loss after repair {after} nats per token")
    usable = [one for one in found if one.nll is not None]
    if not usable:
        raise SimdiffError(f"none of {len(found)} plans can be repaired: {found[0].note}")
    best = min(usable, key=lambda one: one.nll if one.nll is not None else math.inf)
    note = (
        f"chosen among {len(found)} plans of the search by the loss after repair in closed form, "
        "on calibration windows that the repair was not fitted to"
    )
    chosen = replace(plan, removed=best.removed, notes=(*plan.notes, note), choice_agreement=None)
    return chosen, [
        {"removed": list(one.removed), "plain_nll": one.plain_nll, "nll": one.nll, "note": one.note}
        for one in found
    ]


def plans_to_try(plan: PruningPlan, count: int) -> list[tuple[int, ...]]:
    """The plan's own layers, then those of the other evaluated plans, the best first.

    Raises:
        SimdiffError: fewer than 2 are asked for, or the plan holds no other.
    """
    if count < 2:
        raise SimdiffError(f"choose must be at least 2 plans, got {count}")
    evaluated = [one for one in plan.candidates if one.get("nll") is not None]
    ordered = [one["removed"] for one in sorted(evaluated, key=lambda one: float(one["nll"]))]
    seen: dict[frozenset[int], tuple[int, ...]] = {frozenset(plan.removed): tuple(plan.removed)}
    for removed in ordered:
        if len(removed) == len(plan.removed):
            seen.setdefault(frozenset(removed), tuple(removed))
    if len(seen) < 2:
        raise SimdiffError(
            "choose needs a plan that holds the others that its search evaluated, got one of "
            f"criterion {plan.criterion} with none: make it with `simdiff plan --model`"
        )
    return list(seen.values())[:count]


def _repaired(
    model: PreTrainedModel, plan: PruningPlan, windows: Tensor, batch_size: int
) -> RepairedPlan:
    try:
        pruned = sharing_copy(model, plan.removed)
        outcome = recover(model, plan, windows, pruned=pruned, options={}, batch_size=batch_size)
    except SimdiffError as error:
        return RepairedPlan(plan.removed, None, None, str(error))
    losses = {one["corrected"]: one["nll"] for one in outcome.details["losses"]}
    return RepairedPlan(plan.removed, losses[0], losses[outcome.details["corrected"]])
