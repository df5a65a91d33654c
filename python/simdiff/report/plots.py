"""Plots over depth as PNG files: importance, and every metric of the calibration pass."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg")

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from simdiff.scores import LayerScores
from simdiff.selection import PruningPlan

# Distinct in hue and lightness, also for colour-blind readers; removed layers are hatched besides.
KEPT, REMOVED, PEAK = "#5b7083", "#c8442d", "#1b1f24"
_GRID = "#d9dee3"

_PANELS = (
    ("cosine_distance", "cosine distance 1 − cos"),
    ("squared_difference", "squared difference ‖y − x‖² (mean = MSSD)"),
    ("absolute_difference", "absolute difference |y − x| per entry (mean = MASD)"),
    ("relative_difference", "relative difference ‖y − x‖ / ‖x‖"),
)


def importance_plot(plan: PruningPlan) -> bytes:
    """One bar per layer; the removed ones stand out."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes = figure.subplots()
    _bars(axes, plan.importance, plan)
    _frame(axes, plan.num_layers, plan.importance)
    axes.set_ylabel("importance")
    low, high = min(plan.importance), max(plan.importance)
    if low > 0 and high < 4 * low:  # differences would drown in what all layers share
        margin = 0.08 * (high - low) or 0.1 * high
        axes.set_ylim(low - margin, high + margin)
        axes.set_ylabel("importance (axis does not start at 0)")
    axes.set_xlabel("decoder layer, counted from 0")
    alpha = "" if plan.alpha is None else f", α = {plan.alpha:g}"
    axes.set_title(
        f"Importance by {plan.criterion}{alpha}: {len(plan.removed)} lowest of "
        f"{plan.num_layers} layers removed",
        loc="left",
    )
    _legend(axes)
    return _png(figure)


def metrics_plot(scores: LayerScores, plan: PruningPlan) -> bytes:
    """Mean (bars) and maximum over tokens (marks) of each metric over depth."""
    figure = Figure(figsize=(9, 10.5), layout="constrained")
    panels = figure.subplots(len(_PANELS), 1, sharex=True)
    layers = range(scores.num_layers)
    for axes, (name, title) in zip(panels, _PANELS, strict=True):
        table = scores.metrics[name]
        _bars(axes, table.mean, plan)
        axes.plot(layers, table.maximum, "_", color=PEAK, markersize=9, markeredgewidth=1.6,
                  label="maximum over tokens")  # fmt: skip
        _frame(axes, scores.num_layers, [*table.mean, *table.maximum])
        axes.set_title(title, loc="left")
    _legend(panels[0])
    panels[-1].set_xlabel("decoder layer, counted from 0")
    return _png(figure)


def _bars(axes: Axes, values: Sequence[float], plan: PruningPlan) -> None:
    for layers, color, hatch, label in (
        (plan.kept, KEPT, None, "kept (mean)"),
        (sorted(plan.removed), REMOVED, "////", "removed (mean)"),
    ):
        axes.bar(layers, [values[layer] for layer in layers], width=0.78, color=color,
                 hatch=hatch, edgecolor="white", linewidth=0.4, label=label)  # fmt: skip


def _frame(axes: Axes, num_layers: int, values: Sequence[float]) -> None:
    positive = [value for value in values if value > 0]
    if positive and max(positive) > 100 * min(positive):
        axes.set_yscale("log")
        axes.set_ylim(10 ** (math.log10(min(positive)) - 0.3), 10 ** (math.log10(max(positive)) + 0.3))
    axes.set_xlim(-0.7, num_layers - 0.3)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=16, integer=True))
    axes.grid(axis="y", color=_GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(axes: Axes) -> None:
    axes.legend(loc="upper left", ncols=3, fontsize="small", framealpha=0.9)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()
