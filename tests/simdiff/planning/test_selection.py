"""The layers of the lowest importance go: how many, which are protected, and what ties do."""

from __future__ import annotations

import pytest

from simdiff.errors import SimdiffError
from simdiff.planning.criteria import importance
from simdiff.planning.selection import select
from simdiff.scoring.scores import LayerScores
from support.scores import with_means


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
