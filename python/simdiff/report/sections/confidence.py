"""The section on the plan's confidence: shares of bootstrap draws, and the text that it takes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from simdiff.errors import number_of
from simdiff.planning.confidence import AmountOfText, PlanConfidence
from simdiff.planning.plan import PruningPlan
from simdiff.report.html import figure, legend
from simdiff.report.numbers import plain
from simdiff.report.svg import Chart, Scale, depth_scale, depth_ticks


def confidence_section(plan: PruningPlan, results: Mapping[str, Any] | None) -> Iterator[str]:
    """Yield the HTML of the section on confidence; nothing if the plan has none."""
    known = plan.confidence
    if known is None:
        return
    amounts = [AmountOfText(**amount) for amount in (results or {}).get("amounts_of_text", ())]
    yield "<h2>How sure the plan is</h2>"
    if plan.choice_agreement is not None:
        yield (
            f"<p class='lead'>{plan.choice_agreement:.0%} of the draws of the text that the tried "
            "plans read choose the plan of this page again, among those plans.</p>"
        )
    same = {*plan.removed} == {*known.removed}
    yield (
        f"<p class='lead'>{known.agreement:.0%} of {known.num_resamples} draws of the "
        f"{known.num_sequences} calibration windows give the plan that scores alone give, "
        + (
            "which is the same one.</p>"
            if same
            else f"<strong>which is another one: {', '.join(map(str, known.removed))}.</strong> "
            "What follows is of that plan.</p>"
        )
    )
    left = figure(
        _frequency_chart(known),
        "Crosses on a band are the layers in the plan that the scores of all windows give.",
        title="Share of draws that remove a layer",
    )
    right = ""
    if len(amounts) > 1:
        right = figure(
            _amounts_chart(amounts),
            legend({"trained": "layers in common with the plan of all", "apart": "the same plan"}),
            title="Plans from less text",
        )
    yield f"<div class='pair'>{left}{right}</div>"


def _frequency_chart(known: PlanConfidence) -> str:
    open_layers = [
        f"layer {layer} {share:.0%}"
        for layer, share in enumerate(known.plan_frequency)
        if 0 < share < 1
    ]
    chart = Chart(
        "Share of draws that remove a layer",
        f"Of {known.num_resamples} bootstrap draws. Neither always nor never: "
        f"{', '.join(open_layers) or 'none'}.",
    )
    x = depth_scale(chart, len(known.plan_frequency))
    y = Scale(0.0, 1.04, *chart.y_range)
    half = (x(1) - x(0)) / 2
    bottom, top = chart.y_range
    for layer in known.removed:
        chart.add("rect", "band", x=x(layer) - half, y=top, width=2 * half, height=bottom - top)
    chart.y_axis(y, "share of draws, no unit")
    chart.x_axis(x, depth_ticks(len(known.plan_frequency)), "layer, counted from 0")
    for layer, share in enumerate(known.plan_frequency):
        if share:
            chart.line(x(layer), y(0), x(layer), y(share), "stem")
        if layer in known.removed:
            chart.add("path", "gone", d=f"M{x(layer) - 4:.1f} {y(share) - 4:.1f}l8 8m0 -8l-8 8")
        elif share:
            chart.add("circle", "kept", cx=x(layer), cy=y(share), r=3.4)
    return chart.render()


def _amounts_chart(amounts: Sequence[AmountOfText]) -> str:
    """Draw agreement and overlap over the number of groups of windows, on a logarithmic axis."""
    sizes = [amount.num_groups for amount in amounts]
    last = amounts[-1]
    chart = Chart(
        "Plans from less text",
        "Layers in common with the plan of all windows, and the share that is the same plan: "
        + "; ".join(
            f"{number_of(a.num_groups, 'window')} {a.overlap:.0%}, {a.agreement:.0%}"
            for a in amounts
        )
        + ".",
    )
    y = Scale(0.0, 1.04, *chart.y_range)
    start, stop = chart.x_range
    steps = math.log2(last.num_groups)

    def x(size: float) -> float:
        return start + 10 + (stop - start - 20) * math.log2(size) / steps

    chart.y_axis(y, "share, no unit")
    bottom, _ = chart.y_range
    chart.line(chart.left, bottom, stop, bottom, "base")
    for size in sizes:
        chart.text(x(size), bottom + 17, plain(float(size)), text_anchor="middle")
    chart.text(stop, chart.height - 4, "calibration windows drawn", "axis", text_anchor="end")
    for kind in ("dense", "pruned"):
        values = [a.overlap if kind == "dense" else a.agreement for a in amounts]
        points = [(x(size), y(value)) for size, value in zip(sizes, values, strict=True)]
        chart.path(points, f"curve {kind}")
        for px, py in points:
            if kind == "dense":
                chart.add("circle", f"bar {kind}", cx=px, cy=py, r=3.2)
            else:
                chart.add("rect", f"bar {kind}", x=px - 3.4, y=py - 3.4, width=6.8, height=6.8)
    return chart.render()
