"""Charts over depth: the metrics of the calibration pass, and the importance of the layers."""

from __future__ import annotations

import math
from collections.abc import Sequence

from simdiff.planning.names import SEARCHED
from simdiff.planning.plan import PruningPlan
from simdiff.report.numbers import plain
from simdiff.report.svg import Chart, depth_scale, depth_ticks, scale_for
from simdiff.scoring.scores import LayerScores

PANELS = (
    ("cosine_distance", "Cosine distance", "1 − cos, no unit; 0 is no turn"),
    (
        "squared_difference",
        "Squared difference",
        "‖y − x‖², squared units of the hidden state; the mean is MSSD",
    ),
    (
        "absolute_difference",
        "Absolute difference",
        "Σ|y − x| / hidden size, units of the hidden state; the mean is MASD",
    ),
    ("relative_difference", "Relative difference", "‖y − x‖ / ‖x‖, no unit"),
)


def metric_charts(scores: LayerScores, plan: PruningPlan) -> dict[str, str]:
    """A chart for each metric by title, with means, standard errors and maxima over tokens."""
    charts = {}
    for name, title, label in PANELS:
        table = scores.metrics[name]
        charts[title] = _depth_chart(
            plan, title, label, table.mean, errors=table.error, maxima=table.maximum
        )
    return charts


def importance_chart(plan: PruningPlan) -> str:
    """A chart of the importance of every layer, with the highest that was removed."""
    alpha = "" if plan.alpha is None else f", α = {plan.alpha:g}"
    return _depth_chart(
        plan,
        "Importance",
        f"importance by {plan.criterion}{alpha}",
        plan.importance,
        from_zero=plan.criterion not in SEARCHED,  # losses lie far above it, close together
    )


def _depth_chart(
    plan: PruningPlan,
    title: str,
    label: str,
    means: Sequence[float],
    *,
    errors: Sequence[float | None] = (),
    maxima: Sequence[float] = (),
    from_zero: bool = False,
) -> str:
    removed = sorted(plan.removed)
    highest = max(range(plan.num_layers), key=lambda layer: means[layer])
    lowest = min(range(plan.num_layers), key=lambda layer: means[layer])
    chart = Chart(
        title,
        f"{title} of {plan.num_layers} layers: {label}. Lowest mean "
        f"{plain(means[lowest], 3)} at layer {lowest}, highest "
        f"{plain(means[highest], 3)} at layer {highest}. Removed: "
        f"{', '.join(f'layer {layer} {plain(means[layer], 3)}' for layer in removed)}.",
    )
    x = depth_scale(chart, plan.num_layers)
    y = scale_for([*means, *maxima], *chart.y_range)
    if from_zero and not y.logarithmic and min(means) >= 0:
        y = scale_for(means, *chart.y_range, from_zero=True)
    half = (x(1) - x(0)) / 2
    bottom, top = chart.y_range
    for layer in removed:
        chart.add("rect", "band", x=x(layer) - half, y=top, width=2 * half, height=bottom - top)
    chart.y_axis(y, label)
    chart.x_axis(x, depth_ticks(plan.num_layers), "layer, counted from 0")
    for layer, value in enumerate(maxima):
        if math.isfinite(value) and (value > 0 or not y.logarithmic):
            chart.line(x(layer) - 0.8 * half, y(value), x(layer) + 0.8 * half, y(value), "peak")
    for layer, value in enumerate(means):
        if value <= 0 and y.logarithmic:
            continue
        error = errors[layer] if errors else None
        if error is not None:
            chart.line(
                x(layer),
                y(value - error) if value > error else bottom,
                x(layer),
                y(value + error),
                "whisker",
            )
        _mark(chart, x(layer), y(value), layer in plan.removed)
    return chart.render()


def _mark(chart: Chart, x: float, y: float, gone: bool) -> None:
    """Draw a dot for a kept layer or a cross for a removed one, distinct without colour."""
    if gone:
        chart.add("path", "gone", d=f"M{x - 4:.1f} {y - 4:.1f}l8 8m0 -8l-8 8")
    else:
        chart.add("circle", "kept", cx=x, cy=y, r=3.4)
