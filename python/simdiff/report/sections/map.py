"""The section on all blocks: the heat map, and the cheapest block of each length."""

from __future__ import annotations

import html
from collections.abc import Iterator

from simdiff.models.layer_indices import layer_runs
from simdiff.planning.plan import PruningPlan
from simdiff.report.figures.blocks import cheapest_blocks, costs_for, heat_map
from simdiff.report.html import figure, table
from simdiff.report.numbers import plain
from simdiff.scoring.scores import LayerScores


def map_section(scores: LayerScores | None, plan: PruningPlan) -> Iterator[str]:
    """Yield the HTML of the section on all blocks; nothing if blocks were not scored."""
    costs = None if scores is None else costs_for(scores, plan.criterion)
    picture = None if costs is None else heat_map(costs, plan.removed)
    if costs is None or picture is None:
        return
    yield "<h2>Every block of layers</h2>"
    yield (
        "<p class='lead'>Neighbours that go together cost more, or less, than one by one. Each "
        "cell is the cost of taking out all layers from the first to the last, from the same pass: "
        f"<code>{html.escape(costs.formula)}</code>, no unit, x entering the first layer and y "
        "leaving the last.</p>"
    )
    outlined = "; ".join(
        f"layers {i} to {j - 1}: {plain(costs.values[i][j], 3)}"
        if j > i + 1
        else f"layer {i}: {plain(costs.values[i][j], 3)}"
        for i, j in layer_runs(plan.removed)
    )
    caption = f"Bright is cheap; the scale is logarithmic. Outlined: what was removed ({outlined})."
    rows = [
        (str(length), f"{start}" if length == 1 else f"{start}–{stop - 1}", plain(cost))
        for length, start, stop, cost in cheapest_blocks(costs)[: max(12, len(plan.removed))]
    ]
    lengths = table(("layers", "cheapest block", "cost"), rows, text=())
    yield (
        f"<div class='pair'>{figure(picture, caption)}<div><h3>The cheapest block of each length"
        f"</h3>{lengths}</div></div>"
    )
