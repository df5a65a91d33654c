"""Charts of a recovery: losses over training steps, errors of corrected layers, perplexities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from simdiff.errors import number_of
from simdiff.report.numbers import plain
from simdiff.report.svg import Chart, Scale, bar_row, depth_scale, depth_ticks, scale_for

Point = Mapping[str, Any]


def curve_chart(curve: Sequence[Point], best_step: int | None) -> str | None:
    """Draw the losses in training and on the examples set apart over steps and tokens.

    None with fewer than two points.
    """
    if len(curve) < 2:
        return None
    train = [(p["step"], p["train_loss"]) for p in curve if p["train_loss"] is not None]
    apart = [(p["step"], p["set_apart_loss"]) for p in curve if p["set_apart_loss"] is not None]
    if not apart:
        return None
    last = curve[-1]
    chart = Chart(
        "Loss over training",
        f"Loss on examples set apart: from {apart[0][1]:.3f} to {apart[-1][1]:.3f} nats per token "
        f"in {number_of(last['step'], 'step')}, {last['tokens']} tokens, "
        f"{last['seconds']:.0f} seconds. Lowest {min(value for _, value in apart):.3f}.",
        height=280,
        width=920,
        bottom=58,
    )
    x = Scale(0.0, float(last["step"]) or 1.0, chart.x_range[0] + 40, chart.x_range[1] - 50)
    y = scale_for([value for _, value in train + apart], *chart.y_range)
    chart.y_axis(y, "loss, nats per token")
    ticks = [value for value in x.ticks(6) if value == int(value)]
    chart.x_axis(x, ticks, "")
    for value in ticks:
        near = min(curve, key=lambda p: abs(p["step"] - value))
        if near["step"] == value:
            told = f"{plain(float(near['tokens']))} tok., {minutes(near['seconds'])}"
            chart.text(x(value), chart.height - 26, told, "tick", text_anchor="middle")
    chart.text(
        chart.x_range[1],
        chart.height - 4,
        "training step; below it tokens trained on and time",
        "axis",
        text_anchor="end",
    )
    for points, kind in ((train, "dense"), (apart, "pruned")):
        chart.path([(x(step), y(value)) for step, value in points], f"curve {kind}")
        for step, value in points:
            _point(chart, x(step), y(value), kind)
    best = [point for point in apart if point[0] == best_step]
    for step, value in best:
        chart.add("circle", "ring", cx=x(step), cy=y(value), r=8)
    return chart.render()


def _point(chart: Chart, x: float, y: float, kind: str) -> None:
    """Draw a point: round for training, square for the examples set apart."""
    if kind == "dense":
        chart.add("circle", f"bar {kind}", cx=x, cy=y, r=3.2)
    else:
        chart.add("rect", f"bar {kind}", x=x - 3.4, y=y - 3.4, width=6.8, height=6.8)


def minutes(seconds: float) -> str:
    """A time as text, in seconds or minutes."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def layer_error_chart(layers: Sequence[Point], num_layers: int) -> str | None:
    """Draw the share of each layer's error that remains after a closed-form correction; None if no
    layer was corrected."""
    known = [(p["layer"], p["relative_error"]) for p in layers if p["relative_error"] is not None]
    if not known:
        return None
    chart = Chart(
        "Error that remains after the correction",
        "Squared error to the dense model's states after the correction, relative to before, on "
        "windows that were not fitted: "
        + ", ".join(f"layer {layer} {value:.3f}" for layer, value in known)
        + ".",
        width=920,
    )
    x = depth_scale(chart, num_layers)
    y = scale_for([0.0, 1.0, *(value for _, value in known)], *chart.y_range, from_zero=True)
    chart.y_axis(y, "squared error after / before the correction, no unit")
    chart.x_axis(x, depth_ticks(num_layers), "layer, counted from 0")
    for layer, value in known:
        chart.line(x(layer), y(0), x(layer), y(value), "stem")
        chart.add("circle", "kept", cx=x(layer), cy=y(value), r=4)
    return chart.render()


def stages_chart(perplexities: Mapping[str, float]) -> str:
    """Draw the perplexity of the dense, the pruned and the recovered model as bars from zero."""
    chart = Chart(
        "Held-out perplexity",
        "; ".join(f"{stage} {value:.2f}" for stage, value in perplexities.items()) + ".",
        height=26 * len(perplexities) + 62,
        left=74,
    )
    x = Scale(0.0, 1.06 * max(perplexities.values()), chart.left, chart.width - 56)
    for value in x.ticks():
        chart.line(x(value), 16, x(value), chart.height - 40, "grid")
    for index, (stage, value) in enumerate(perplexities.items()):
        bar_row(chart, x, 20 + 26 * index, stage, value, f"{value:.2f}")
    chart.x_axis(x, x.ticks(), "held-out perplexity, lower is better")
    return chart.render()
