"""Charts over depth: where their axes begin."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from simdiff.planning.plan import PruningPlan
from simdiff.report.figures.depth import importance_chart
from simdiff.report.svg import Chart

VALUES = (0.02, 0.03, 0.025, 0.04, 0.05, 0.03)


def heights(plan: PruningPlan) -> list[float]:
    """Of the dots above the lower end of the drawing area, in order of depth."""
    bottom = Chart("", "").y_range[0]
    return [
        bottom - float(y) for y in re.findall(r'<circle [^>]*cy="([\d.]+)"', importance_chart(plan))
    ]


def test_importance_begins_at_zero(run: tuple[Path, PruningPlan]) -> None:
    plan = replace(run[1], importance=VALUES)
    kept = [VALUES[layer] for layer in plan.kept]
    found = heights(plan)
    assert [one / found[0] for one in found] == pytest.approx(
        [one / kept[0] for one in kept], rel=0.02
    )


def test_losses_of_a_search_keep_their_differences(run: tuple[Path, PruningPlan]) -> None:
    plan = replace(run[1], criterion="greedy-perplexity", importance=tuple(9 + v for v in VALUES))
    found = heights(plan)
    assert max(found) > 5 * min(found)
