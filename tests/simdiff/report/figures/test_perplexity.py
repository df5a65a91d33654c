"""The chart of a comparison, by places on paper."""

from __future__ import annotations

import math
import re
from types import SimpleNamespace
from typing import Any

import pytest

from simdiff.report.figures.perplexity import _ARROW, perplexity_chart


def comparison(**perplexities: dict[int, float]) -> Any:
    """Dense 10; of each criterion perplexities by removed layers, with no intervals."""

    def at(name: str, count: int) -> Any:
        value = perplexities[name].get(count)
        quality = None if value is None else SimpleNamespace(perplexity=value, low=None, high=None)
        return SimpleNamespace(cell=SimpleNamespace(num_remove=count), quality=quality)

    return SimpleNamespace(
        dense=SimpleNamespace(perplexity=10.0),
        counts=(2, 4),
        criteria=tuple(perplexities),
        scores=SimpleNamespace(num_layers=30),
        at=at,
    )


def lines_of(chart: str, kind: str) -> list[list[tuple[float, float]]]:
    paths = re.findall(rf'<path class="line {kind}[^"]*" d="([^"]*L[^"]*)"', chart)
    return [
        [(float(x), float(y)) for x, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", path)]
        for path in paths
    ]


def test_places_are_logarithms() -> None:
    """One row of names: the area is 420 - 52 pixels high below 16, and 748 - 58 wide.

    It holds 9.3 to 1.12 · 40, and 1.7 to 4.3 layers.
    """
    chart = perplexity_chart(comparison(simdiff={2: 20.0, 4: 40.0}, random={2: 30.0}))

    def place(count: int, value: float) -> tuple[float, float]:
        share = math.log(value / 9.3) / math.log(44.8 / 9.3)
        return 58 + 690 * (count - 1.7) / 2.6, 368 - 352 * share

    line, name = lines_of(chart, "ours")
    assert [place(2, 20), place(4, 40)] == [pytest.approx(point, abs=0.06) for point in line]
    assert len({y for _, y in name}) == 1  # the sample beside its name
    assert len(lines_of(chart, "blind")) == 1  # one point makes no line: the sample alone, dashed
    assert chart.count("stroke-dasharray") == 1
    # What the axis counts stands above the names, which begin at 368 + 52.
    assert re.search(r'y="404"[^>]*>removed layers of 30<', chart)
    for words in ("simdiff: 2 layers 20, 4 layers 40", "random: 2 layers 30", "dense 10", "of 30"):
        assert words in chart


def test_what_is_far_above_the_others_is_an_arrow_at_the_edge() -> None:
    """The axis ends where the others do; it is 9.3 to 1.12 * 30 here, whatever `random` reaches."""
    others = {"simdiff": {2: 20.0, 4: 30.0}, "last-n": {2: 21.0, 4: 25.0}}
    chart = perplexity_chart(comparison(**others, random={2: 22.0, 4: 200.0}))
    (line, _) = lines_of(chart, "ours")
    assert line[1][1] == pytest.approx(
        368 - 352 * math.log(30 / 9.3) / math.log(33.6 / 9.3), abs=0.06
    )
    assert "an arrow at the edge is more than 30.00" in chart
    assert chart.count(_ARROW) == 1
    assert "random: 2 layers 22, 4 layers 200" in chart
    whole = perplexity_chart(comparison(**others, random={2: 22.0, 4: 60.0}))
    assert "arrow" not in whole
    # A line to the edge, none along it.
    far = perplexity_chart(comparison(**others, random={2: 2e6, 4: 5e6}))
    assert (far.count(_ARROW), len(lines_of(far, "blind"))) == (
        2,
        len(lines_of(chart, "blind")) - 1,
    )


def test_fifty_times_the_dense_perplexity_is_as_far_as_it_goes() -> None:
    broken = perplexity_chart(comparison(simdiff={2: 500.0, 4: 1e9}))
    assert "an arrow at the edge is more than 500.00" in broken
    assert "arrow" not in perplexity_chart(comparison(simdiff={2: 400.0, 4: 500.0}))


def test_a_criterion_that_was_refused_everywhere() -> None:
    chart = perplexity_chart(comparison(simdiff={2: 20.0, 4: 30.0}, random={}))
    assert "random: not measured" in chart
