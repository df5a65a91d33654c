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
GRID = "#d9dee3"

# Linear axes hide the small layers when values span more than this factor.
LOG_FROM = 30

_PANELS = (
    ("cosine_distance", "cosine distance 1 − cos"),
    ("squared_difference", "squared difference ‖y − x‖² (mean = MSSD)"),
    ("absolute_difference", "absolute difference |y − x| per entry (mean = MASD)"),
    ("relative_difference", "relative difference ‖y − x‖ / ‖x‖"),
)


def importance_plot(plan: PruningPlan) -> bytes:
    """One mark per layer around the limit of removal; the few far above are named at the top."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes = figure.subplots()
    ordered = sorted(plan.importance)
    spread = ordered[int(0.8 * (len(ordered) - 1))] - ordered[0] or abs(ordered[0]) or 1.0
    bottom, top = ordered[0] - 0.12 * spread, ordered[0] + 1.35 * spread
    for layers, color, marker, label in (
        (plan.kept, KEPT, "o", "kept"),
        (sorted(plan.removed), REMOVED, "X", "removed"),
    ):
        inside = [layer for layer in layers if plan.importance[layer] <= top]
        values = [plan.importance[layer] for layer in inside]
        axes.vlines(inside, bottom, values, color=color, linewidth=1.2, alpha=0.6)
        axes.plot(inside, values, marker, color=color, markersize=7, label=label)
    for layer, value in enumerate(plan.importance):
        if value > top:
            axes.plot(layer, top, "^", color=KEPT, markersize=7, clip_on=False)
            axes.annotate(f"{value:.3g}", (layer, top), xytext=(0, -8), ha="center", va="top",
                          rotation=90, textcoords="offset points", fontsize="x-small")  # fmt: skip
    limit = max(plan.importance[layer] for layer in plan.removed)
    axes.axhline(limit, color=REMOVED, linewidth=0.9, linestyle="--", label="highest removed")
    _depth_axis(axes, plan.num_layers)
    axes.set_ylim(bottom, top)
    axes.set_ylabel("importance")
    axes.set_xlabel("decoder layer, counted from 0")
    alpha = "" if plan.alpha is None else f", α = {plan.alpha:g}"
    axes.set_title(
        f"Importance by {plan.criterion}{alpha}: {len(plan.removed)} of "
        f"{plan.num_layers} layers removed",
        loc="left",
    )
    figure.legend(loc="outside lower right", ncols=3, fontsize="small", frameon=False)
    return png(figure)


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
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower right", ncols=3, fontsize="small",
                  frameon=False)  # fmt: skip
    panels[-1].set_xlabel("decoder layer, counted from 0")
    return png(figure)


def _bars(axes: Axes, values: Sequence[float], plan: PruningPlan) -> None:
    for layers, color, hatch, label in (
        (plan.kept, KEPT, None, "kept (mean)"),
        (sorted(plan.removed), REMOVED, "////", "removed (mean)"),
    ):
        axes.bar(layers, [values[layer] for layer in layers], width=0.78, color=color,
                 hatch=hatch, edgecolor="white", linewidth=0.4, label=label)  # fmt: skip


def _frame(axes: Axes, num_layers: int, values: Sequence[float]) -> None:
    _depth_axis(axes, num_layers)
    positive = [value for value in values if value > 0]
    if positive and max(positive) > LOG_FROM * min(positive):
        axes.set_yscale("log")
        axes.set_ylim(
            10 ** (math.log10(min(positive)) - 0.3), 10 ** (math.log10(max(positive)) + 0.3)
        )


def _depth_axis(axes: Axes, num_layers: int) -> None:
    axes.set_xlim(-0.7, num_layers - 0.3)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=16, integer=True))
    axes.grid(axis="y", color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()
