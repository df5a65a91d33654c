"""What a plan reaches, against sizes written out by hand."""

from __future__ import annotations

import pytest

from simdiff.planning.budget import Budget
from simdiff.planning.options import PlanOptions
from simdiff.planning.outcome import in_dtype, outcome, outcome_line
from simdiff.planning.plan import PruningPlan
from simdiff.scoring.scores import LayerScores

MODEL = {
    "num_layers": 4,
    "num_parameters": 10_000_000,
    "layer_parameters": [1_000_000, 2_000_000, 1_000_000, 1_000_000],
    "embedding_parameters": 2_000_000,
    "dtype": "bfloat16",
}


def test_sizes_and_speed() -> None:
    found = outcome(MODEL, (1, 3))
    assert found == {
        "num_layers": [4, 2],
        "num_parameters": [10_000_000, 7_000_000],
        "num_bytes": [20_000_000, 14_000_000],
        "decode_times_faster": pytest.approx(8 / 5),
    }
    line = outcome_line(found, {"speed_up": 1.5})
    assert line == (
        "2 of 4 layers stay: 10.0 → 7.0 M parameters (-30%), 20.0 → 14.0 MB, decoding about 1.60 "
        "times as fast, by the bytes it reads; asked for: decoding 1.5 times faster"
    )
    assert outcome({"num_layers": 4}, (1,)) is None
    assert outcome_line(None, {}) is None
    assert outcome(MODEL | {"dtype": "int8"}, (1,))["num_bytes"] is None


def test_a_cut_in_another_dtype() -> None:
    found = in_dtype(outcome(MODEL | {"dtype": "float32"}, (1, 3)), "bfloat16")
    assert found is not None
    assert found["num_bytes"] == [40_000_000, 14_000_000]
    assert found["decode_times_faster"] == pytest.approx(2 * 8 / 5)
    assert in_dtype(outcome(MODEL, (1, 3)), "auto") == outcome(MODEL, (1, 3))
    assert in_dtype(None, "bfloat16") is None


@pytest.mark.parametrize(
    "budget", [Budget(), Budget(num_layers=3), Budget(speed_up=1.2), Budget(parameter_ratio=0.1)]
)
def test_a_plan_keeps_what_was_asked(llama_scores: LayerScores, budget: Budget, tmp_path) -> None:
    plan = PlanOptions(budget=budget, bootstrap=0).plan(llama_scores)
    plan.save(tmp_path / "plan.json")
    again = PruningPlan.load(tmp_path / "plan.json")
    given = {name: value for name, value in vars(budget).items() if value is not None}
    assert again.asked == plan.asked == (given or {"ratio": 0.25})
    assert again.outcome == outcome(llama_scores.model, plan.removed)
    if budget.speed_up:
        assert again.outcome["decode_times_faster"] >= budget.speed_up
    line = str(outcome_line(again.outcome, again.asked))
    assert "asked for: " in line
    assert f"{llama_scores.num_layers - len(plan.removed)} of " in line
