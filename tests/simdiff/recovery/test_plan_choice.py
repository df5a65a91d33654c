"""Plans compared by the loss after their repair."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

from simdiff.errors import SimdiffError
from simdiff.recovery.closed_form.method import recover, unseen_windows
from simdiff.recovery.plan_choice import choose_repaired, plans_to_try
from simdiff.surgery.copies import sharing_copy
from support.own_text import decided, drawn
from support.plans import plan_for

PLANS = ((1, 4), (2, 3), (3, 4))


def row(removed: tuple[int, ...], nll: float | None) -> dict[str, object]:
    return {"removed": list(removed), "origin": "search", "nll": nll, "num_windows": 2}


def test_the_best_after_repair_is_taken(llama: PreTrainedModel) -> None:
    """Whatever the search found better before it, and by windows that no repair was fitted to."""
    model = decided(llama, 6)
    windows = drawn(model, 32, 32)
    unseen = windows[-unseen_windows(windows, 1 / 8) :]
    losses = {}
    for removed in PLANS:
        pruned = sharing_copy(model, removed)
        plan = plan_for(6, removed)
        recover(model, plan, windows, pruned=pruned, options={}, batch_size=8)
        with torch.no_grad():
            losses[removed] = float(pruned(input_ids=unseen, labels=unseen).loss)
    best = min(losses, key=lambda removed: losses[removed])
    worst = max(losses, key=lambda removed: losses[removed])
    assert losses[worst] > losses[best] + 1e-3
    candidates = tuple(row(removed, nll) for nll, removed in enumerate(PLANS))
    plan = replace(plan_for(6, worst), candidates=candidates, choice_agreement=0.9)
    chosen, tried = choose_repaired(model, plan, windows, 3, 8)
    assert chosen.removed == best
    assert chosen.choice_agreement is None
    assert tuple(tried[0]["removed"]) == worst, "the plan's own layers are tried first"
    for one in tried:
        assert one["nll"] == pytest.approx(losses[tuple(one["removed"])], rel=1e-3)
        assert one["nll"] <= one["plain_nll"]


def test_which_plans_are_tried() -> None:
    candidates = (row((2, 3), 3.0), row((1, 4), 2.0), row((0, 5), None), row((4, 3), 2.5))
    plan = replace(plan_for(6, (3, 4)), candidates=(*candidates, row((1,), 1.0)))
    assert plans_to_try(plan, 9) == [(3, 4), (1, 4), (2, 3)]
    assert plans_to_try(plan, 2) == [(3, 4), (1, 4)]
    with pytest.raises(SimdiffError, match="at least 2 plans, got 1"):
        plans_to_try(plan, 1)
    with pytest.raises(SimdiffError, match="the others that its search evaluated"):
        plans_to_try(plan_for(6, (3, 4)), 2)
