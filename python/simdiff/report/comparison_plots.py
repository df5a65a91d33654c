"""Plots of a comparison: perplexity over removed layers, layers taken, the all-block matrix."""

from __future__ import annotations

import math

from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from simdiff.block_costs import block_costs
from simdiff.comparison_results import Comparison
from simdiff.report.plots import GRID, KEPT, REMOVED, png
from simdiff.scores import LayerScores

# Colour tells the family, line and marker the member; grey needs no look at the model.
_OURS, _PAPER, _COSINE, _LENGTH, _BLIND, _SEARCH = (
    "#c8442d", "#d08a1d", "#2f6fa8", "#3a8a5a", "#8a949e", "#1b1f24",
)  # fmt: skip
_LINES = {
    "simdiff": (_OURS, "-", "o"),
    "simdiff-mssd": (_PAPER, "-", "^"),
    "simdiff-masd": (_PAPER, "--", "v"),
    "simdiff-max": (_PAPER, ":", "D"),
    "simdiff-mssd-swept": (_PAPER, "-.", "P"),
    "simdiff-masd-swept": (_PAPER, "-.", "X"),
    "simdiff-max-swept": (_PAPER, "-.", "*"),
    "block-influence": (_COSINE, "-", "o"),
    "cosine-block": (_COSINE, "--", "s"),
    "angular-block": (_COSINE, "-.", "^"),
    "angular-block-last": (_COSINE, ":", "D"),
    "relative-magnitude": (_LENGTH, "-", "^"),
    "norm-ratio": (_LENGTH, "--", "v"),
    "last-n": (_BLIND, "-", "<"),
    "random": (_BLIND, ":", ">"),
    "one-shot-perplexity": (_SEARCH, ":", "s"),
    "greedy-perplexity": (_SEARCH, "-", "s"),
}
_PROMINENT = ("simdiff", "greedy-perplexity")

# Beyond this factor of the dense perplexity a model is broken; how badly tells nothing.
_CEILING = 50


def perplexity_plot(comparison: Comparison) -> bytes:
    """One line per criterion; what lies above the axis is broken and marked at its edge."""
    figure = Figure(figsize=(9, 6.4), layout="constrained")
    axes = figure.subplots()
    dense = comparison.dense.perplexity
    top = _CEILING * dense
    highest = dense
    for name in comparison.criteria:
        entries = [comparison.at(name, count) for count in comparison.counts]
        points = [(e.cell.num_remove, e.quality) for e in entries if e.quality is not None]
        counts = [count for count, _ in points]
        values = [min(quality.perplexity, top) for _, quality in points]
        highest = max(highest, *values) if values else highest
        color, line, marker = _LINES.get(name, (KEPT, "-", "."))
        width, size, order = (2.4, 6, 3) if name in _PROMINENT else (1.2, 4.5, 2)
        axes.plot(counts, values, line, marker=marker, color=color, linewidth=width,
                  markersize=size, zorder=order, label=name)  # fmt: skip
        if name in _PROMINENT:
            low = [q.perplexity if q.low is None else q.low for _, q in points]
            high = [min(q.perplexity if q.high is None else q.high, top) for _, q in points]
            axes.fill_between(counts, low, high, color=color, alpha=0.12, linewidth=0)
    axes.axhline(dense, color=_SEARCH, linewidth=0.9, linestyle=(0, (6, 3)))
    axes.annotate(f"dense {dense:.2f}", (1, dense), xytext=(-4, 3), ha="right",
                  xycoords=("axes fraction", "data"), textcoords="offset points",
                  fontsize="small")  # fmt: skip
    axes.set_yscale("log")
    axes.set_ylim(0.93 * dense, 1.12 * min(highest, top))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xticks(comparison.counts)
    axes.grid(axis="y", color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(f"removed layers of {comparison.scores.num_layers}")
    axes.set_ylabel("held-out perplexity")
    edge = f"; at the top edge: {_CEILING} times dense or more" if highest >= top else ""
    axes.set_title(f"Perplexity without recovery{edge}", loc="left")
    figure.legend(loc="outside lower center", ncols=4, fontsize="small", frameon=False)
    return png(figure)


def layers_plot(comparison: Comparison) -> bytes:
    """One panel for each number of layers: a row per criterion, removed layers filled."""
    names, counts = comparison.criteria, comparison.counts
    rows = math.ceil(len(counts) / 2)
    height = rows * (0.19 * len(names) + 0.75) + 0.3
    figure = Figure(figsize=(11, height), layout="constrained")
    panels = figure.subplots(rows, min(2, len(counts)), squeeze=False, sharey=True)
    for axes, count in zip(panels.flat, counts, strict=False):
        taken = [
            [layer in comparison.at(name, count).removed for layer in _depth(comparison)]
            for name in names
        ]
        axes.imshow(taken, cmap=ListedColormap(["#eef1f3", REMOVED]), vmin=0, vmax=1,
                    aspect="auto", interpolation="none")  # fmt: skip
        axes.set_title(f"{count} removed", loc="left", fontsize="medium")
        axes.set_yticks(range(len(names)), names, fontsize="small")
        _between_cells(axes, comparison.scores.num_layers, len(names))
    for axes in panels.flat[len(counts) :]:
        axes.set_visible(False)
    for axes in panels[-1]:
        axes.set_xlabel("decoder layer, counted from 0")
    return png(figure)


def _depth(comparison: Comparison) -> range:
    return range(comparison.scores.num_layers)


def _between_cells(axes: Axes, columns: int, rows: int) -> None:
    axes.set_xticks([x - 0.5 for x in range(columns + 1)], minor=True)
    axes.set_yticks([y - 0.5 for y in range(rows + 1)], minor=True)
    axes.grid(which="minor", color="white", linewidth=1)
    axes.tick_params(which="both", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True))
    axes.spines[:].set_visible(False)


def blocks_plot(scores: LayerScores) -> bytes | None:
    """The costs of all blocks as heat maps, by turn and growth and by turn alone."""
    if scores.blocks is None:
        return None
    figure = Figure(figsize=(11, 5), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, criterion, title in (
        (panels[0], "simdiff", "cost by simdiff: turn and growth"),
        (panels[1], "cosine-distance", "cosine distance alone"),
    ):
        costs = block_costs(scores, criterion).values
        depth = range(scores.num_layers)
        # Columns count the last layer of the block, so that a single layer is on the diagonal.
        cells = [[costs[i][j + 1] if i <= j else math.nan for j in depth] for i in depth]
        positive = [value for row in cells for value in row if value > 0]
        if not positive:
            return None
        norm = LogNorm(min(positive), max(max(positive), min(positive) * 1.001))
        image = axes.imshow(cells, cmap="viridis", norm=norm, interpolation="none")
        figure.colorbar(image, ax=axes, shrink=0.8)
        axes.set_title(title, loc="left", fontsize="medium")
        axes.set_xlabel("last layer of the block")
        axes.set_ylabel("first layer of the block")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(nbins=10, integer=True))
        axes.spines[:].set_visible(False)
    return png(figure)
