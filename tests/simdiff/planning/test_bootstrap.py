"""The bootstrap over sequences: frequencies of plans, draws, and how much text is enough."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from simdiff.errors import SimdiffError
from simdiff.planning.bootstrap import amounts_of_text, bootstrap_plan
from simdiff.planning.criteria import CRITERIA
from simdiff.planning.draws import draws, resampled
from simdiff.planning.make_plan import BLOCK_CRITERION_OF, make_plan
from simdiff.planning.plan import PruningPlan
from simdiff.scoring.calibration_pass import score
from simdiff.scoring.scores import LayerScores
from support.states import unlike_sequences


@pytest.fixture
def ids() -> torch.Tensor:
    return unlike_sequences()


@pytest.mark.parametrize("criterion", [*CRITERIA])
def test_plan_frequencies_of_every_criterion(
    llama_scores: LayerScores, llama: PreTrainedModel, ids: torch.Tensor, criterion: str
) -> None:
    """Against plans of the concatenated sequences of each draw, scored from the model anew."""
    scores = score(llama, [ids], progress=False)
    selections = ["lowest", "contiguous", "blocks"] if criterion in BLOCK_CRITERION_OF else [None]
    weights = draws(6, 8, seed=3)
    for selection in selections:

        def plan_of(given: LayerScores, selection: str | None = selection) -> PruningPlan:
            return make_plan(given, 2, criterion=criterion, selection=selection)

        found = bootstrap_plan(scores, plan_of, num_resamples=8, seed=3)
        assert found is not None
        plans = []
        for row in weights:
            drawn = ids.repeat_interleave(torch.from_numpy(row), dim=0)
            plans.append(sorted(plan_of(score(llama, [drawn], progress=False)).removed))
        times = [sum(layer in plan for plan in plans) / 8 for layer in range(6)]
        assert found.plan_frequency == pytest.approx(times)
        assert list(found.removed) == sorted(plan_of(scores).removed)
        assert found.agreement == pytest.approx(plans.count(list(found.removed)) / 8)


def test_draws_are_seeded_and_even() -> None:
    assert np.array_equal(draws(5, 40, seed=1), draws(5, 40, seed=1))
    assert not np.array_equal(draws(5, 40, seed=1), draws(5, 40, seed=2))
    counts = draws(4, 20_000, seed=0)
    assert np.unique(counts.sum(1)).tolist() == [4]
    # A count is binomial (4, 1/4): mean 1, variance 3/4.
    assert counts.mean(0).tolist() == pytest.approx([1] * 4, abs=0.03)
    assert counts.var(0).tolist() == pytest.approx([0.75] * 4, abs=0.04)
    assert draws(7, 3, size=2).sum(1).tolist() == [2, 2, 2]


def test_a_resample_without_a_plan_counts_as_another(llama_scores: LayerScores) -> None:
    calls = itertools.count()

    def plan_of(scores: LayerScores) -> PruningPlan:
        if next(calls) in (2, 5):  # the first call is for the scores themselves
            raise SimdiffError("too few are free")
        return make_plan(scores, 2, criterion="last-n")

    found = bootstrap_plan(llama_scores, plan_of, num_resamples=10)
    assert found is not None
    assert (found.num_failed, found.agreement) == (2, 0.8)
    assert found.plan_frequency == (0, 0, 0, 0, 0.8, 0.8)
    assert "2 give no plan at all" in found.note(found.removed)
    with pytest.raises(SimdiffError, match="at least 1, got 0"):
        bootstrap_plan(llama_scores, plan_of, num_resamples=0)


def test_draws_without_any_plan_are_an_error(llama_scores: LayerScores) -> None:
    """What fails in all of them is missing from them: no frequency of zero, silently."""
    calls = itertools.count()

    def plan_of(scores: LayerScores) -> PruningPlan:
        if next(calls):
            raise SimdiffError("criterion angular-block needs angles")
        return make_plan(scores, 2, criterion="last-n")

    with pytest.raises(SimdiffError, match="10 draws .* got none .*angular-block needs angles"):
        bootstrap_plan(llama_scores, plan_of, num_resamples=10)


def test_confidence_in_a_plan_file(llama_scores: LayerScores, tmp_path: Path) -> None:
    found = bootstrap_plan(llama_scores, lambda given: make_plan(given, 2), num_resamples=20)
    assert found is not None
    for low, value, high in zip(
        found.importance_low,
        make_plan(llama_scores, 2).importance,
        found.importance_high,
        strict=True,
    ):
        assert low < value < high
    plan = dataclasses.replace(make_plan(llama_scores, 2), confidence=found)
    plan.save(tmp_path / "plan.json")
    assert PruningPlan.load(tmp_path / "plan.json") == plan
    content = plan.to_dict()
    content["confidence"]["plan_frequency"].pop()
    (tmp_path / "plan.json").write_text(json.dumps(content))
    with pytest.raises(SimdiffError, match="plan_frequency must have 6 entries"):
        PruningPlan.load(tmp_path / "plan.json")


def test_amounts_of_text(llama_scores: LayerScores) -> None:
    found = amounts_of_text(llama_scores, lambda given: make_plan(given, 2))
    assert [amount.num_groups for amount in found] == [1, 2, 4]
    assert all(0 <= amount.agreement <= amount.overlap <= 1 for amount in found)
    assert found[0].overlap < 1
    wanted = {*make_plan(llama_scores, 2).removed}
    alone = [
        len({*make_plan(given, 2).removed} & wanted) / 2
        for given in resampled(llama_scores, draws(5, 60, size=1))
    ]
    assert found[0].overlap == pytest.approx(np.mean(alone))
    always = amounts_of_text(llama_scores, lambda given: make_plan(given, 2, criterion="last-n"))
    assert [(amount.agreement, amount.overlap) for amount in always] == [(1, 1)] * 3
