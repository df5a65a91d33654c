"""The sweep over alpha against a fine grid in exact arithmetic, and against every set there is."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from fractions import Fraction

import pytest

from simdiff.errors import SimdiffError
from simdiff.planning.alpha_sweep import AlphaSweep, alpha_intervals, sweep_alpha, sweep_plan
from simdiff.planning.criteria import importance, sigmoid
from simdiff.scoring.scores import LayerScores


def with_columns(scores: LayerScores, cosine: list[float], squared: list[float]) -> LayerScores:
    metrics = dict(scores.metrics)
    for name, values in (("cosine_distance", cosine), ("squared_difference", squared)):
        metrics[name] = dataclasses.replace(metrics[name], mean=tuple(values))
    return dataclasses.replace(scores, metrics=metrics)


def lowest(
    cosine: list[float], squared: list[float], alpha: Fraction, count: int, protect: tuple = ()
) -> tuple[int, ...]:
    """The paper's formula in fractions, ties by L_diff, then by depth."""
    keys = [
        (alpha * Fraction(sigmoid(d)) + (1 - alpha) * Fraction(c) / 2, d, layer)
        for layer, (c, d) in enumerate(zip(cosine, squared, strict=True))
        if layer not in protect
    ]
    return tuple(sorted(layer for _, _, layer in sorted(keys)[:count]))


def columns(case: str, seed: int) -> tuple[list[float], list[float]]:
    generator = random.Random(seed)
    if case == "ties":  # few values, so that lines coincide and cross in one point
        return (
            [generator.choice((0.25, 0.5, 0.75)) for _ in range(6)],
            [generator.choice((-1.0, 0.0, 1.0)) for _ in range(6)],
        )
    if case == "saturated":  # half of the sigmoids are exactly 1
        squared = [generator.choice((40.0, 900.0, 1.0, 2.0)) for _ in range(6)]
        return [generator.random() for _ in range(6)], squared
    return [generator.random() for _ in range(6)], [generator.uniform(-2, 2) for _ in range(6)]


@pytest.mark.parametrize("case", ["plain", "ties", "saturated"])
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("protect", [(), (0, 4)])
def test_intervals(llama_scores: LayerScores, case: str, seed: int, protect: tuple) -> None:
    cosine, squared = columns(case, seed)
    scores = with_columns(llama_scores, cosine, squared)
    intervals = alpha_intervals(scores, "simdiff-mssd", 3, protect)
    # They follow one another without gap or overlap, and neighbours differ.
    assert intervals[0].lower == 0
    assert intervals[0].lower_closed
    assert intervals[-1].upper == 1
    assert intervals[-1].upper_closed
    for left, right in itertools.pairwise(intervals):
        assert left.upper == right.lower
        assert left.upper_closed != right.lower_closed
        assert left.removed != right.removed
    # The grid, the ends of all intervals, and what lies closest beside them.
    alphas = {Fraction(step, 1000) for step in range(1001)}
    tiny = Fraction(1, 10**30)
    for interval in intervals:
        alphas |= {interval.lower, interval.upper, interval.lower + tiny, interval.upper - tiny}
    for alpha in alphas:
        if 0 <= alpha <= 1:
            found = [interval for interval in intervals if alpha in interval]
            assert len(found) == 1, alpha
            assert found[0].removed == lowest(cosine, squared, alpha, 3, protect), alpha


def test_no_set_is_missed_and_none_is_evaluated_twice(llama_scores: LayerScores) -> None:
    cosine, squared = columns("plain", 5)
    scores = with_columns(llama_scores, cosine, squared)
    table = {}
    generator = random.Random(0)

    def evaluate(removed: tuple[int, ...]) -> float:
        assert removed not in table, "evaluated twice"
        table[removed] = generator.uniform(10, 20)
        return table[removed]

    sweep = sweep_alpha(scores, "simdiff-mssd", 2, evaluate)
    # Brute force: the middles between all values where two lines cross, and these values.
    lines = [
        (Fraction(c) / 2, Fraction(sigmoid(d)) - Fraction(c) / 2)
        for c, d in zip(cosine, squared, strict=True)
    ]
    crossings = {Fraction(0), Fraction(1)}
    for first, slope in lines:
        for second, other in lines:
            if slope != other and 0 < (second - first) / (slope - other) < 1:
                crossings.add((second - first) / (slope - other))
    points = sorted(crossings)
    points += [(a + b) / 2 for a, b in itertools.pairwise(points)]
    sets = {lowest(cosine, squared, alpha, 2) for alpha in points}
    assert len(sets) > 2
    assert set(table) == sets == set(sweep.perplexity)
    assert table[sweep.best.removed] == min(table.values())
    plan = sweep_plan(scores, sweep)
    assert sorted(plan.removed) == list(sweep.best.removed)
    assert plan.alpha in sweep.best
    assert sorted(importance(scores, "simdiff-mssd", plan.alpha).ranking()[:2]) == sorted(
        plan.removed
    )
    assert f"{len(sets)} distinct sets" in plan.notes[-1]
    curve = sweep.to_dict()["curve"]
    assert [entry["perplexity"] for entry in curve] == [
        table[tuple(entry["removed"])] for entry in curve
    ]


def test_all_saturated_has_one_set_below_one(llama_scores: LayerScores) -> None:
    cosine = [0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    scores = with_columns(llama_scores, cosine, [100.0, 200, 300, 400, 500, 600])
    below, at_one = alpha_intervals(scores, "simdiff-mssd", 2)
    assert (below.removed, str(below)) == ((4, 5), "[0, 1)")  # block influence
    assert (at_one.removed, at_one.alpha) == ((0, 1), 1.0)  # L_diff itself
    assert below.alpha == 0.5


def test_what_is_not_finite_is_reported_and_never_chosen(llama_scores: LayerScores) -> None:
    cosine, squared = columns("plain", 5)
    scores = with_columns(llama_scores, cosine, squared)
    values = iter([math.nan, math.inf, 12.0, *[13.0] * 50])
    sweep = sweep_alpha(scores, "simdiff-mssd", 2, lambda removed: next(values))
    assert sweep.perplexity[sweep.best.removed] == 12
    assert [note for note in sweep.notes() if "perplexity nan: out" in note]
    assert [note for note in sweep.notes() if "perplexity inf: out" in note]
    assert [entry["perplexity"] for entry in sweep.to_dict()["curve"]].count(None) == 2
    with pytest.raises(SimdiffError, match="finite for some alpha, got none"):
        sweep_alpha(scores, "simdiff-mssd", 2, lambda removed: math.nan)
    assert isinstance(sweep, AlphaSweep)


def test_what_cannot_be_swept(llama_scores: LayerScores) -> None:
    with pytest.raises(SimdiffError, match="simdiff-mssd, simdiff-masd, simdiff-max.*'random'"):
        alpha_intervals(llama_scores, "random", 2)
    with pytest.raises(SimdiffError, match="3 layers must be free"):
        alpha_intervals(llama_scores, "simdiff-masd", 3, protect=(0, 1, 2, 3))
