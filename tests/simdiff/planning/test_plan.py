"""Plans: the place of every layer in the ranking, and their files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from simdiff.errors import SimdiffError
from simdiff.planning.confidence import PlanConfidence
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
        (111, "2nd lowest, worse in blocks"),
        (110, "3rd lowest, worse in blocks"),
        (109, "4th lowest, worse in blocks"),
        (108, "5th lowest"),
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
    evaluated = dataclasses.replace(plan, candidates=({"removed": [3]},))
    assert evaluated.reason(111) == "2nd lowest, worse by loss"
    with pytest.raises(SimdiffError, match="layer must be 0 to 112, got 113"):
        plan.reason(113)


def test_draws_of_another_plan_do_not_stand_beside_this_one() -> None:
    """Perplexity may choose other layers than those that were drawn again."""
    plan = plan_for(6, (2, 4))
    found = PlanConfidence((2, 4), (0.5,) * 6, 0.5, (0.0,) * 6, (1.0,) * 6, 500, 0, 4, 4, 0)
    assert dataclasses.replace(plan, confidence=found).draws is found
    assert dataclasses.replace(plan, removed=(2, 3), confidence=found).draws is None
    assert plan.draws is None


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
        ({"num_layers": 10**12, "ranking": [], "importance": []}, "from 1 to 10000, got 10"),
        ({"alpha": float("inf")}, "must be finite"),
    ):
        path.write_text(json.dumps({**content, **change}))
        with pytest.raises(SimdiffError, match=wanted):
            PruningPlan.load(path)


def test_a_plan_that_is_nested_or_large_without_measure(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text('{"schema": "simdiff.plan", "alpha": ' + "[" * 100_000)
    with pytest.raises(SimdiffError, match="nested too deeply"):
        PruningPlan.load(path)
    with path.open("wb") as file:
        file.truncate(10**12)
    with pytest.raises(SimdiffError, match="at most 100,000,000 bytes, got 1,000,000,000,000"):
        PruningPlan.load(path)


@pytest.mark.parametrize(
    ("content", "num_layers"),
    [
        ("2\n3\n", 0),
        ("2,3\n", 0),
        ("\ufeff2-3", 0),
        ("[2, 3]", 0),
        ('{"removed": [2, 3]}', 0),
        ('{"removed": [2, 3], "num_layers": 6}', 6),
        ('{"schema": "simdiff.plan", "schema_version": 2, "num_layers": 6, "removed": [2, 3]}', 6),
    ],
)
def test_layers_alone_are_a_plan(tmp_path: Path, content: str, num_layers: int) -> None:
    path = tmp_path / "mine"
    path.write_text(content, encoding="utf-8")
    plan = PruningPlan.load(path)
    assert (plan.removed, plan.num_layers, plan.by_hand) == ((2, 3), num_layers, True)
    known = plan.of_depth(6, "m")
    assert (known.kept, known.model["name"]) == ((0, 1, 4, 5), "m")
    assert [known.reason(layer) for layer in (2, 4)] == ["named by hand", "not named"]
    known.save(path)
    assert PruningPlan.load(path) == known
    plan.save(path)
    assert PruningPlan.load(path) == plan
    if not num_layers:
        with pytest.raises(SimdiffError, match='2, 3.* does not tell how many .*"num_layers"'):
            _ = plan.kept
        with pytest.raises(SimdiffError, match="from 0 to 2, got 3"):
            plan.of_depth(3, "m")
        with pytest.raises(SimdiffError, match="0 to 1 layers|1 to 1 layers of 2"):
            PruningPlan((0, 1)).of_depth(2, "m")
    else:
        with pytest.raises(SimdiffError, match="it is of 6 layers, and m has 8"):
            plan.of_depth(8, "m")


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ("merge_method: passthrough\n", "must be a plan .*2,3,8-10 .*export"),
        ("9-8", "from the lower to the higher"),
        ('{"removed": []}', "1 layer or more"),
        ('{"removed": [1, 1]}', "named once"),
        ('{"removed": ["1"]}', "got '1'"),
        ('{"removed": [1], "num_layers": 1}', "from 0 to 0, got 1"),
        ('{"removed": [0], "num_layers": true}', "num_layers must be"),
        ('{"removed": [0], "num_layers": 3, "protected": ["1; rm"]}', "protected layers"),
        ('{"layers": [1]}', "got schema None"),
    ],
)
def test_what_is_no_plan(tmp_path: Path, content: str, wanted: str) -> None:
    path = tmp_path / "mine"
    path.write_text(content)
    with pytest.raises(SimdiffError, match=wanted) as raised:
        PruningPlan.load(path)
    assert str(path) in str(raised.value)
