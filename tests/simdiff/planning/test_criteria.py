"""Every criterion against its formula written out, on scores and on states of transformers."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from simdiff.errors import SimdiffError
from simdiff.planning.budget import Budget
from simdiff.planning.criteria import CRITERIA, importance, sigmoid
from simdiff.planning.make_plan import make_plan
from simdiff.planning.options import PlanOptions
from simdiff.planning.plan import PruningPlan
from simdiff.planning.selection import select
from simdiff.scoring.calibration_pass import score
from simdiff.scoring.scores import LayerScores
from support.scores import with_means
from support.states import hidden_states


def test_criteria_of_single_layers(tiny: PreTrainedModel, token_batches: list) -> None:
    scores = score(tiny, token_batches, progress=False)
    states = hidden_states(tiny, token_batches)
    before, after = states[:-1].flatten(1, 2), states[1:].flatten(1, 2)
    wanted = {
        "block-influence": 1 - torch.cosine_similarity(before, after, dim=-1).mean(1),
        "relative-magnitude": ((after - before).norm(dim=-1) / before.norm(dim=-1)).mean(1),
        "norm-ratio": (after.norm(dim=-1).mean(1) / before.norm(dim=-1).mean(1)).log().abs(),
        "last-n": torch.arange(5, -1, -1),
    }
    for name, values in wanted.items():
        ranked = importance(scores, name)
        assert ranked.values == pytest.approx(values.tolist(), rel=1e-4, abs=1e-9), name
        assert (ranked.alpha, "seed" in ranked.formula) == (None, False)
    assert select(scores, importance(scores, "last-n"), 3).removed == (5, 4, 3)


def test_random_follows_its_seed(llama_scores: LayerScores) -> None:
    plans = {
        seed: select(llama_scores, importance(llama_scores, "random", seed=seed), 3).removed
        for seed in range(200)
    }
    again = importance(llama_scores, "random", seed=3)
    assert select(llama_scores, again, 3).removed == plans[3]
    assert "seed 3" in again.formula
    assert len({frozenset(removed) for removed in plans.values()}) == math.comb(6, 3)
    counts = [sum(layer in removed for removed in plans.values()) for layer in range(6)]
    assert all(70 < count < 130 for count in counts)  # 100 expected, four standard deviations


def test_what_a_criterion_lacks_is_said(llama_scores: LayerScores) -> None:
    metrics = dict(llama_scores.metrics)
    del metrics["norm_after"]
    scores = dataclasses.replace(llama_scores, metrics=metrics)
    with pytest.raises(SimdiffError, match="norm-ratio needs norm_after.*run `simdiff score`"):
        importance(scores, "norm-ratio")
    bare = dataclasses.replace(llama_scores, blocks=None, last_token_angles=None)
    with pytest.raises(SimdiffError, match="needs the scores of all blocks.*`simdiff score`"):
        make_plan(bare, 2, criterion="cosine-block")
    with pytest.raises(SimdiffError, match="at the last token of each.*`simdiff score`"):
        make_plan(bare, 2, criterion="angular-block-last")
    with pytest.raises(SimdiffError, match="protected layers .* leave no such choice"):
        make_plan(llama_scores, 3, criterion="cosine-block", protect=(1, 4))
    erased = dataclasses.replace(metrics["norm_before"], mean=(1.0, 1.0, 0.0, 1.0, 1.0, 1.0))
    scores = dataclasses.replace(
        llama_scores, metrics={**llama_scores.metrics, "norm_before": erased}
    )
    with pytest.raises(SimdiffError, match="norm-ratio: importance must be finite.*layers 2"):
        importance(scores, "norm-ratio")


def test_every_criterion_plans_from_the_same_saved_scores(
    llama_scores: LayerScores, tmp_path: Path
) -> None:
    llama_scores.save(tmp_path / "scores.json")
    scores = LayerScores.load(tmp_path / "scores.json")
    for name in CRITERIA:
        plan = PlanOptions(name, budget=Budget(num_layers=2), protect=(2,)).plan(scores)
        assert len(plan.removed) == 2
        assert 2 not in plan.removed
        assert plan.criterion == name
        plan.save(tmp_path / "plan.json")
        assert PruningPlan.load(tmp_path / "plan.json") == plan
    for damage, wanted in (
        ([[0.5]], "damaged"),
        ([[math.nan] * (6 - row) for row in range(6)], "numbers must be finite, got NaN"),
        ("none", "damaged"),
    ):
        content = {**llama_scores.to_dict(), "last_token_angles": damage}
        (tmp_path / "scores.json").write_text(json.dumps(content))
        with pytest.raises(SimdiffError, match=wanted):
            LayerScores.load(tmp_path / "scores.json")


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_formulas(llama_scores: LayerScores, alpha: float) -> None:
    metrics = llama_scores.metrics
    cosine = torch.tensor(metrics["cosine_distance"].mean, dtype=torch.float64)
    differences = {
        "simdiff-mssd": metrics["squared_difference"].mean,
        "simdiff-masd": metrics["absolute_difference"].mean,
        "simdiff-max": metrics["squared_difference"].maximum,
    }
    for name, difference in differences.items():
        squashed = torch.tensor(difference, dtype=torch.float64).sigmoid()
        wanted = alpha * squashed + (1 - alpha) * cosine / 2
        assert importance(llama_scores, name, alpha).values == pytest.approx(wanted.tolist())
    assert importance(llama_scores, "block-influence").values == tuple(cosine.tolist())
    assert {name for name, entry in CRITERIA.items() if entry.takes_alpha} == set(differences)


def test_sigmoid() -> None:
    assert sigmoid(-800) == 0
    assert sigmoid(36) < 1 == sigmoid(37)
    assert sigmoid(-2) == pytest.approx(1 / (1 + math.e**2), rel=1e-15)


def test_saturation_is_told_and_ranks_like_block_influence(llama_scores: LayerScores) -> None:
    cosine = (0.5, 0.1, 0.3, 0.2, 0.6, 0.4)
    scores = with_means(
        llama_scores, cosine_distance=cosine, squared_difference=(50, 900, 60, 70, 40, 80)
    )
    ranked = importance(scores, "simdiff-mssd", 0.7)
    assert ranked.saturated == (0, 1, 2, 3, 4, 5)
    assert ranked.ranking() == importance(scores, "block-influence").ranking()
    assert "1 for 6 of 6 layers" in ranked.notes()[0]
    assert "block influence" in ranked.notes()[0]
    partly = importance(with_means(scores, squared_difference=(50, 1, 2, 3, 4, 5)), "simdiff-mssd")
    assert partly.saturated == (0,)
    assert "1 of 6 layers" in partly.notes()[0]


def test_bad_criteria(llama_scores: LayerScores) -> None:
    with pytest.raises(SimdiffError, match="one of simdiff, simdiff-mssd, .*got 'taylor'"):
        importance(llama_scores, "taylor")
    for alpha in (-0.1, 1.1, math.nan):
        with pytest.raises(SimdiffError, match=r"alpha must be in \[0, 1\]"):
            importance(llama_scores, alpha=alpha)
