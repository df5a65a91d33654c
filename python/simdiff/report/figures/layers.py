"""Chart of the layers that each criterion removes: a row per criterion, a cell per layer."""

from __future__ import annotations

from simdiff.comparison.results import Comparison
from simdiff.report.numbers import plain
from simdiff.report.svg import Chart, depth_ticks

_ROW, _LABEL = 17, 142


def layers_chart(comparison: Comparison, count: int) -> str:
    """Draw the removed layers of every criterion at one number of layers."""
    depth = comparison.scores.num_layers
    taken = {name: comparison.at(name, count).removed for name in comparison.criteria}
    told = "; ".join(
        f"{name}: {', '.join(map(str, layers)) or 'none'}" for name, layers in taken.items()
    )
    chart = Chart(
        f"Layers that each criterion removes, {count} of {depth}",
        f"{told}.",
        height=_ROW * len(taken) + 42,
        left=_LABEL,
    )
    left, right = chart.x_range
    size = (right - left) / depth
    for row, (name, layers) in enumerate(taken.items()):
        y = 2 + _ROW * row
        chart.text(left - 7, y + 12, name, text_anchor="end")
        chart.add("rect", "track", x=left, y=y, width=right - left, height=_ROW - 3)
        for layer in layers:
            chart.add(
                "rect",
                "bar pruned",
                x=left + layer * size,
                y=y,
                width=max(size - 1, 0.5),
                height=_ROW - 3,
            )
    bottom = _ROW * len(taken) + 16
    for tick in depth_ticks(depth):
        chart.text(left + (tick + 0.5) * size, bottom, plain(tick), text_anchor="middle")
    chart.text(right, chart.height - 4, "layer, counted from 0", "axis", text_anchor="end")
    return chart.render()
