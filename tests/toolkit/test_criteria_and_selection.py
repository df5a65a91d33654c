"""Criteria against the paper's formulas written out, selection, and both file formats."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from plans import plan_for

from simdiff.criteria import CRITERIA, importance, sigmoid
from simdiff.errors import SimdiffError
from simdiff.scores import LayerScores, MetricTable
from simdiff.selection import PruningPlan, layers_for_ratio, select
from simdiff_kernels import METRICS


def with_means(scores: LayerScores, **columns: tuple[float, ...]) -> LayerScores:
    """The same scores with other means (and maxima one above) of some metrics."""
    metrics = dict(scores.metrics)
    for name, values in columns.items():
        old = metrics[name]
        metrics[name] = MetricTable(
            values, old.standard_error, tuple(v + 1 for v in values), old.location
        )
    return dataclasses.replace(scores, metrics=metrics)


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


def test_ties_are_told_and_broken_by_the_difference(llama_scores: LayerScores) -> None:
    difference = (90, 50, 80, 60, 70, 85)
    scores = with_means(llama_scores, cosine_distance=(0.1,) * 6, squared_difference=difference)
    ranked = importance(scores, "simdiff-mssd")
    assert ranked.ties == ((0, 1, 2, 3, 4, 5),)
    tie = "tie: layers 0, 1, 2, 3, 4, 5 have equal importance, ordered by"
    assert ranked.notes()[-1] == f"{tie} L_diff"
    plan = select(scores, ranked, 3)
    assert plan.removed == (1, 3, 4)
    assert "lowest" in plan.reason(1)
    whole = importance(scores, "block-influence")
    assert whole.notes() == [f"{tie} the cosine distance"]
    assert select(scores, whole, 2).removed == (0, 1)


def test_selection(llama_scores: LayerScores) -> None:
    scores = with_means(llama_scores, cosine_distance=(0.5, 0.1, 0.3, 0.2, 0.6, 0.4))
    ranked = importance(scores, "block-influence")
    plan = select(scores, ranked, 3)
    assert plan.removed == (1, 3, 2)
    assert plan.kept == (0, 4, 5)
    assert select(scores, ranked, 3, protect=(3, 0)).removed == (1, 2, 5)
    for count, protect, wanted in (
        (0, (), "1 to 5 of 6, got 0"),
        (6, (), "1 to 5 of 6, got 6"),
        (3, (0, 1, 2, 3), "3 layers must be free to remove, got 2: 4 of 6 are protected"),
        (3, (6,), "indices from 0 to 5, got 6"),
    ):
        with pytest.raises(SimdiffError, match=wanted):
            select(scores, ranked, count, protect)


def test_reasons_name_the_place_in_the_ranking() -> None:
    """Of 113 layers, ranked from the last to the first; blocks of one and of three go."""
    plan = dataclasses.replace(
        plan_for(113, (112, 92, 91, 93)),
        ranking=tuple(range(112, -1, -1)),
        protected=(0,),
        selection="blocks",
    )
    for layer, reason in (
        (112, "1st lowest, alone"), (111, "2nd lowest"), (110, "3rd lowest"), (109, "4th lowest"),
        (103, "10th lowest"), (102, "11th lowest"), (101, "12th lowest"), (100, "13th lowest"),
        (93, "20th lowest, in block 91-93"), (92, "21st lowest, in block 91-93"),
        (91, "22nd lowest, in block 91-93"), (90, "23rd lowest"), (12, "101st lowest"),
        (2, "111th lowest"), (1, "112th lowest"), (0, "113th lowest, protected"),
    ):  # fmt: skip
        assert plan.reason(layer) == reason
    lowest = dataclasses.replace(plan, selection="lowest")
    assert lowest.reason(92) == "21st lowest"


def test_ratio() -> None:
    assert layers_for_ratio(30, 0.25) == 7
    assert layers_for_ratio(32, 0.25) == 8
    assert layers_for_ratio(10, 0.3) == 3
    for ratio in (0, 1, -0.1, 1.5, math.nan):
        with pytest.raises(SimdiffError, match="above 0 and below 1"):
            layers_for_ratio(30, ratio)
    with pytest.raises(SimdiffError, match=r"at least one of 30 layers \(0.0333"):
        layers_for_ratio(30, 0.01)


def test_bad_criteria(llama_scores: LayerScores) -> None:
    with pytest.raises(SimdiffError, match="one of simdiff, simdiff-mssd, .*got 'taylor'"):
        importance(llama_scores, "taylor")
    for alpha in (-0.1, 1.1, math.nan):
        with pytest.raises(SimdiffError, match=r"alpha must be in \[0, 1\]"):
            importance(llama_scores, alpha=alpha)


def test_scores_file_round_trip(llama_scores: LayerScores, tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    llama_scores.save(path)
    assert LayerScores.load(path) == llama_scores
    assert [entry.name for entry in tmp_path.iterdir()] == ["scores.json"]


def test_plan_file_round_trip(llama_scores: LayerScores, tmp_path: Path) -> None:
    plan = select(llama_scores, importance(llama_scores), 2, protect=(0,))
    plan.save(tmp_path / "plan.json")
    assert PruningPlan.load(tmp_path / "plan.json") == plan


def damaged_scores(content: dict) -> dict[str, tuple[object, str]]:
    metric = content["metrics"]["cosine_distance"]
    without = {
        **content,
        "metrics": {k: v for k, v in content["metrics"].items() if k != METRICS[0]},
    }
    short = {**metric, "mean": metric["mean"][:-1]}
    text = {**metric, "mean": ["low"] * 6}
    return {
        "newer": (
            {**content, "schema_version": 5},
            "schema_version 1 to 4, got 5; a newer simdiff",
        ),
        "no version": ({**content, "schema_version": None}, "schema_version 1 to 4, got None"),
        "a plan": (
            {**content, "schema": "simdiff.plan"},
            "be a simdiff.scores file.*'simdiff.plan'",
        ),
        "a list": ([content], "got schema 'list'"),
        "no metric": (without, "damaged.*cosine_distance"),
        "short": ({**content, "metrics": {**content["metrics"], METRICS[0]: short}}, "6 entries"),
        "words": ({**content, "metrics": {**content["metrics"], METRICS[0]: text}}, "damaged"),
    }


def test_damaged_scores_are_refused(llama_scores: LayerScores, tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    for content, wanted in damaged_scores(llama_scores.to_dict()).values():
        path.write_text(json.dumps(content))
        with pytest.raises(SimdiffError, match=wanted):
            LayerScores.load(path)
    path.write_text(json.dumps(llama_scores.to_dict())[:200])
    with pytest.raises(SimdiffError, match="is not JSON"):
        LayerScores.load(path)
    path.write_text(json.dumps(llama_scores.to_dict()).replace(
        repr(llama_scores.metrics[METRICS[0]].mean[0]), "NaN", 1))  # fmt: skip
    with pytest.raises(SimdiffError, match="not finite"):
        LayerScores.load(path)
    with pytest.raises(SimdiffError, match="No such file"):
        LayerScores.load(tmp_path / "none.json")


def test_damaged_plans_are_refused(llama_scores: LayerScores, tmp_path: Path) -> None:
    content = select(llama_scores, importance(llama_scores), 2).to_dict()
    path = tmp_path / "plan.json"
    for change, wanted in (
        ({"removed": [1, 1]}, "named once"),
        ({"removed": [6]}, "from 0 to 5, got 6"),
        ({"removed": list(range(6))}, "1 to 5 layers"),
        ({"importance": [1.0]}, "6 entries"),
        ({"ranking": [0, 0, 1, 2, 3, 4]}, "every layer once"),
    ):
        path.write_text(json.dumps({**content, **change}))
        with pytest.raises(SimdiffError, match=wanted):
            PruningPlan.load(path)
