"""The heat map of all blocks: the cost of cutting layers start ... stop - 1."""

from __future__ import annotations

import math
from collections.abc import Collection

from simdiff.models.layer_indices import layer_runs
from simdiff.planning.block_costs import block_costs
from simdiff.planning.blocks import BlockCosts
from simdiff.report.numbers import plain
from simdiff.report.svg import Chart, Scale, depth_ticks
from simdiff.scoring.scores import LayerScores

# Viridis from its bright end, so that cheap blocks stand out on light and dark backgrounds.
COLORS = (
    "#fde725",
    "#bddf26",
    "#7ad151",
    "#44bf70",
    "#22a884",
    "#21918c",
    "#2a788e",
    "#355f8d",
    "#414487",
    "#482878",
    "#440154",
)
_BINS = 33
# Criteria whose own block costs are shown; all others show those of simdiff.
_COSTS = {
    "cosine-block": "cosine-distance",
    "angular-block": "angular-distance",
    "angular-block-last": "last-token-angle",
}


def costs_for(scores: LayerScores, criterion: str) -> BlockCosts | None:
    """The costs for the heat map of a plan; None if blocks were not scored."""
    name = _COSTS.get(criterion, "simdiff")
    if (scores.last_token_angles if name == "last-token-angle" else scores.blocks) is None:
        return None
    return block_costs(scores, name)


def heat_map(costs: BlockCosts, removed: Collection[int] = ()) -> str | None:
    """Draw the costs with the first layer down and the last layer across.

    Single layers are on the diagonal. Each colour is one path, not a shape for each block, which
    keeps the picture of a deep model small. None if no block has a cost above zero.
    """
    depth = costs.num_layers
    cells = {(i, j): costs.values[i][j + 1] for i in range(depth) for j in range(i, depth)}
    positive = [value for value in cells.values() if value > 0 and math.isfinite(value)]
    if not positive:
        return None
    blocks = layer_runs(removed)
    low, high = min(positive), max(max(positive), 1.001 * min(positive))
    told = "; ".join(
        f"layers {start} to {stop - 1} cost {plain(costs.values[start][stop], 3)}"
        for start, stop in blocks
    )
    outlined = f" Outlined, the removed blocks: {told}." if told else ""
    chart = Chart(
        "Cost of every block",
        f"Heat map of the cost of cutting every block of consecutive layers, {costs.criterion}: "
        f"from {plain(low, 3)} to {plain(high, 3)}, logarithmic.{outlined}",
        height=464,
        left=44,
    )
    size = (chart.x_range[1] - chart.left) / depth
    x = Scale(0, depth, chart.left, chart.left + depth * size)
    y = Scale(0, depth, 16, 16 + depth * size)
    _cells(chart, cells, (low, high), x, y, size)
    for start, stop in blocks:
        chart.add("rect", "halo", x=x(stop - 1), y=y(start), width=size, height=size)
        chart.add("rect", "chosen", x=x(stop - 1), y=y(start), width=size, height=size)
    _axes(chart, x, y, size, depth)
    _color_bar(chart, low, high)
    return chart.render()


def _cells(
    chart: Chart,
    cells: dict[tuple[int, int], float],
    limits: tuple[float, float],
    x: Scale,
    y: Scale,
    size: float,
) -> None:
    scale = Scale(*limits, 0, _BINS - 1, logarithmic=True)
    paths: dict[int, list[str]] = {}
    side = f"{size:.2f}"
    for (start, last), value in cells.items():
        shade = round(scale(value)) if value > 0 else 0
        paths.setdefault(shade, []).append(f"M{x(last):.2f} {y(start):.2f}h{side}v{side}h-{side}z")
    for shade, steps in sorted(paths.items()):
        chart.add("path", "cells", d="".join(steps), fill=color(shade / (_BINS - 1)))


def color(share: float) -> str:
    """The colour for a position from 0 to 1 on the scale, interpolated in `COLORS`."""
    place = share * (len(COLORS) - 1)
    index = min(int(place), len(COLORS) - 2)
    rest = place - index
    channels = [
        round((1 - rest) * int(a, 16) + rest * int(b, 16))
        for a, b in zip(_pairs(COLORS[index]), _pairs(COLORS[index + 1]), strict=True)
    ]
    return "#" + "".join(f"{channel:02x}" for channel in channels)


def _pairs(text: str) -> list[str]:
    return [text[place : place + 2] for place in (1, 3, 5)]


def _axes(chart: Chart, x: Scale, y: Scale, size: float, depth: int) -> None:
    for layer in depth_ticks(depth):
        chart.text(x(layer) + size / 2, y(depth) + 15, plain(layer), text_anchor="middle")
        chart.text(chart.left - 6, y(layer) + size / 2 + 4, plain(layer), text_anchor="end")
    chart.text(0, 10, "first layer of the block ↓", "axis")
    chart.text(x(depth), y(depth) + 32, "last layer of the block →", "axis", text_anchor="end")


def _color_bar(chart: Chart, low: float, high: float) -> None:
    """Draw the colour bar in the empty triangle below the diagonal."""
    left, width, top = chart.left + 14.0, 168.0, 340.0
    scale = Scale(low, high, left, left + width, logarithmic=True)
    step = width / len(COLORS)
    chart.text(left, top - 8, "cost of cutting the block", "axis")
    for index in range(len(COLORS)):
        shade = color(index / (len(COLORS) - 1))
        chart.add("rect", x=left + index * step, y=top, width=step + 0.3, height=11, fill=shade)
    ticks = scale.ticks(3)
    for value in ticks if len(ticks) < 5 else ticks[::2]:
        chart.text(scale(value), top + 25, plain(value), text_anchor="middle")


def cheapest_blocks(costs: BlockCosts) -> list[tuple[int, int, int, float]]:
    """The cheapest block of each length: (length, start, stop, cost)."""
    depth = costs.num_layers
    result = []
    for length in range(1, depth):
        start = min(range(depth - length + 1), key=lambda i: costs.values[i][i + length])
        stop = start + length
        result.append((length, start, stop, costs.values[start][stop]))
    return result
