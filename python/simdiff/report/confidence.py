"""How sure the plan is, for the report: each layer's share of draws, and how much text it takes."""

from __future__ import annotations

import html
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from simdiff.plan_confidence import AmountOfText, PlanConfidence
from simdiff.report.plots import GRID, KEPT, REMOVED, png


def confidence_text(confidence: PlanConfidence, amounts: Sequence[AmountOfText]) -> str:
    """The text alternative of the plot, escaped."""
    last = amounts[-1]
    return html.escape(
        f"Left: share of {confidence.num_resamples} bootstrap draws of {confidence.num_groups} "
        "groups of calibration sequences in whose plan each layer is. Right: what plans of fewer "
        "groups have in common with the plan of all, and how often they are the same"
        f"; {last.agreement:.0%} with {last.num_groups}."
    )


def confidence_plot(confidence: PlanConfidence, amounts: Sequence[AmountOfText]) -> bytes:
    """Two panels: over depth, and over the number of calibration sequences."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    layers = range(len(confidence.plan_frequency))
    for chosen, color, label in (
        ([k for k in layers if k not in confidence.removed], KEPT, "not in the plan"),
        (list(confidence.removed), REMOVED, "in the plan of all text"),
    ):
        left.bar(chosen, [confidence.plan_frequency[layer] for layer in chosen], width=0.78,
                 color=color, label=label, hatch="////" if color == REMOVED else None,
                 edgecolor="white", linewidth=0.4)  # fmt: skip
    left.set_xlabel("decoder layer, counted from 0")
    left.set_title("share of draws that remove it", loc="left", fontsize="medium")
    left.legend(fontsize="small", frameon=False)
    sizes = [amount.num_groups for amount in amounts]
    for values, marker, color, label in (
        ([a.overlap for a in amounts], "o-", KEPT, "layers in common"),
        ([a.agreement for a in amounts], "s-", REMOVED, "the same plan"),
    ):
        right.plot(sizes, values, marker, color=color, markersize=4, label=label)
    right.set_xscale("log", base=2)
    right.set_xticks(sizes, [str(size) for size in sizes])
    one = confidence.num_groups == confidence.num_sequences
    right.set_xlabel("calibration sequences" if one else "groups of calibration sequences")
    right.set_title("plans from less text", loc="left", fontsize="medium")
    right.legend(fontsize="small", frameon=False)
    for axes in (left, right):
        _share_axis(axes)
    return png(figure)


def _share_axis(axes: Axes) -> None:
    axes.set_ylim(0, 1.04)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(axis="y", color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
