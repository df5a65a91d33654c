"""Plans of sub-layers: chosen, kept in files, refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from simdiff.errors import SimdiffError
from simdiff.planning.criteria import CRITERIA
from simdiff.scoring.scores import LayerScores
from simdiff.sublayers.any_plan import load_any_plan
from simdiff.sublayers.plan import NOT_OF_SUBLAYERS, SublayerPlan, plan_sublayers
from simdiff.sublayers.scores import SublayerScores
from simdiff.sublayers.structure import SublayerName


def lowest(values: dict[SublayerName, float], count: int) -> tuple[SublayerName, ...]:
    return tuple(sorted(values, key=lambda name: values[name])[:count])


@pytest.mark.parametrize("unit", ["attention", "mlp", "sublayer"])
def test_the_lowest_go(scores: LayerScores, unit: str) -> None:
    table = SublayerScores.from_scores(scores)
    squashed = {
        name: 0.3 / (1 + math.exp(-table.metrics["absolute_difference"].mean[row]))
        + 0.7 * table.metrics["cosine_distance"].mean[row] / 2
        for row, name in enumerate(table.names)
    }
    own = {
        "block-influence": dict(
            zip(table.names, table.metrics["cosine_distance"].mean, strict=True)
        ),
        "relative-magnitude": dict(
            zip(table.names, table.metrics["relative_difference"].mean, strict=True)
        ),
        "simdiff": {
            name: table.metrics["cosine_distance"].mean[row] + table.norm_change[row]
            for row, name in enumerate(table.names)
        },
        "simdiff-masd": squashed,
    }
    for criterion, values in own.items():
        values = {name: v for name, v in values.items() if unit in ("sublayer", name.kind)}
        plan = plan_sublayers(scores, unit, 4, criterion=criterion, alpha=0.3)
        assert plan.removed == lowest(values, 4), criterion
        assert plan.importance == pytest.approx(sorted(values.values()))
        free = {name: v for name, v in values.items() if name.layer not in (1, 2)}
        plan = plan_sublayers(scores, unit, 3, criterion=criterion, alpha=0.3, protect=(1, 2))
        assert plan.removed == lowest(free, 3)


def test_every_criterion_of_single_units(scores: LayerScores, tmp_path: Path) -> None:
    for criterion in CRITERIA:
        if criterion in NOT_OF_SUBLAYERS:
            with pytest.raises(SimdiffError, match="not defined for sub-layers"):
                plan_sublayers(scores, "mlp", 2, criterion=criterion)
            continue
        plan = plan_sublayers(scores, "sublayer", 3, criterion=criterion)
        plan.save(tmp_path / "plan.json")
        assert load_any_plan(tmp_path / "plan.json") == plan


def test_damaged_plans(scores: LayerScores, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan_sublayers(scores, "attention", 2).save(path)
    content = json.loads(path.read_text())
    for damage in (
        {"removed": []},
        {"removed": [[0, "mlp"]]},
        {"removed": [[6, "attention"]]},
        {"unit": "head"},
        {"sublayers": content["sublayers"] + content["sublayers"][:1]},
        {"notes": None},
    ):
        path.write_text(json.dumps({**content, **damage}))
        with pytest.raises(SimdiffError, match="complete plan of sub-layers, but is damaged"):
            SublayerPlan.load(path)


@pytest.mark.parametrize(
    ("unit", "count", "wanted"),
    [
        ("head", 1, "attention, mlp, sublayer, got 'head'"),
        ("mlp", 0, "got 0"),
        ("sublayer", 12, "got 12"),
    ],
)
def test_bad_plans(scores: LayerScores, unit: str, count: int, wanted: str) -> None:
    with pytest.raises(SimdiffError, match=wanted):
        plan_sublayers(scores, unit, count)
