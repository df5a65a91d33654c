"""Chart of tokens per second, dense and pruned, with the ideal speed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from simdiff.report.numbers import speed_text
from simdiff.report.svg import Chart, Scale, bar_row


@dataclass(frozen=True)
class SpeedPair:
    """Speeds of both models in one phase of one setting, in tokens per second."""

    label: str
    dense: float
    pruned: float
    ratio: float
    ideal: float | None = None
    """Ideal speed-up of the pruned model."""
    share: float | None = None
    """Share of the ideal speed-up that was measured."""
    dense_quartiles: tuple[float, float] | None = None
    pruned_quartiles: tuple[float, float] | None = None
    ratio_interval: tuple[float, float] | None = None


def speed_chart(title: str, ideal_by: str, pairs: Sequence[SpeedPair]) -> str:
    """Draw two bars for each pair; a line across the lower one is the ideal, thin lines are
    quartiles."""
    told = "; ".join(
        f"{pair.label}: dense {speed_text(pair.dense)}, pruned {speed_text(pair.pruned)}"
        + ("" if pair.ideal is None else f", ideal {speed_text(pair.dense * pair.ideal)}")
        for pair in pairs
    )
    rows = 66
    chart = Chart(
        f"{title}, tokens per second",
        f"Bars in tokens per second. {told}.",
        height=22 + rows * len(pairs) + 40,
        left=56,
    )
    most = max(
        value
        for pair in pairs
        for value in (
            pair.dense,
            pair.pruned,
            pair.dense * (pair.ideal or 0),
            *(pair.dense_quartiles or ()),
            *(pair.pruned_quartiles or ()),
        )
    )
    x = Scale(0.0, 1.06 * most, chart.left, chart.width - 56)
    for value in x.ticks():
        chart.line(x(value), 16, x(value), chart.height - 40, "grid")
    for index, pair in enumerate(pairs):
        _pair(chart, x, 16 + rows * index, pair)
    chart.x_axis(
        x, x.ticks(), "tokens per second" + (f"; | ideal by {ideal_by}" if ideal_by else "")
    )
    return chart.render()


def _pair(chart: Chart, x: Scale, top: float, pair: SpeedPair) -> None:
    chart.text(chart.left, top + 13, pair.label, "axis")
    for shift, name, value, quartiles in (
        (19, "dense", pair.dense, pair.dense_quartiles),
        (40, "pruned", pair.pruned, pair.pruned_quartiles),
    ):
        y = top + shift
        bar_row(chart, x, y, name, value, speed_text(value))
        if quartiles is not None:
            chart.line(x(quartiles[0]), y + 9, x(quartiles[1]), y + 9, "whisker")
    if pair.ideal is not None:
        place = x(pair.dense * pair.ideal)
        chart.line(place, top + 36, place, top + 62, "ideal")
