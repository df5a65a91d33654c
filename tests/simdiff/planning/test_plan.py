"""Plans: the place of every layer in the ranking, and their files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from simdiff.errors import SimdiffError
from simdiff.planning.criteria import importance
from simdiff.planning.plan import PruningPlan
from simdiff.planning.selection import select
from simdiff.scoring.scores import LayerScores
from support.plans import plan_for


def test_reasons_name_the_place_in_the_ranking() -> None:
    """Of 113 layers, ranked from the last to the first; blocks of one and of three go."""
    plan = dataclasses.replace(
        plan_for(113, (112, 92, 91, 93)),
        ranking=tuple(range(112, -1, -1)),
        protected=(0,),
        selection="blocks",
    )
    for layer, reason in (
        (112, "1st lowest, alone"),
        (111, "2nd lowest"),
        (110, "3rd lowest"),
        (109, "4th lowest"),
        (103, "10th lowest"),
        (102, "11th lowest"),
        (101, "12th lowest"),
        (100, "13th lowest"),
        (93, "20th lowest, in block 91-93"),
        (92, "21st lowest, in block 91-93"),
        (91, "22nd lowest, in block 91-93"),
        (90, "23rd lowest"),
        (12, "101st lowest"),
        (2, "111th lowest"),
        (1, "112th lowest"),
        (0, "113th lowest, protected"),
    ):
        assert plan.reason(layer) == reason
    lowest = dataclasses.replace(plan, selection="lowest")
    assert lowest.reason(92) == "21st lowest"


def test_plan_file_round_trip(llama_scores: LayerScores, tmp_path: Path) -> None:
    plan = select(llama_scores, importance(llama_scores), 2, protect=(0,))
    plan.save(tmp_path / "plan.json")
    assert PruningPlan.load(tmp_path / "plan.json") == plan


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
