"""Chart of perplexity over the number of removed layers, with a line for each criterion."""

from __future__ import annotations

from itertools import pairwise

from simdiff.comparison.results import Comparison
from simdiff.errors import number_of
from simdiff.report.numbers import perplexity_text, plain
from simdiff.report.svg import Chart, Scale

# Class, dashes and marker of each criterion's line. The class sets the colour, which shows the
# family (ours, the paper's, cosine, length, fixed ones, searches by perplexity); dashes and marker
# show the member.
_LINES = {
    "simdiff": ("ours", "", "o"),
    "simdiff-mssd": ("paper", "", "^"),
    "simdiff-masd": ("paper", "6 3", "v"),
    "simdiff-max": ("paper", "2 2", "d"),
    "simdiff-mssd-swept": ("paper", "6 2 2 2", "^"),
    "simdiff-masd-swept": ("paper", "6 2 2 2", "v"),
    "simdiff-max-swept": ("paper", "6 2 2 2", "d"),
    "block-influence": ("cosine", "", "o"),
    "cosine-block": ("cosine", "6 3", "s"),
    "angular-block": ("cosine", "6 2 2 2", "^"),
    "angular-block-last": ("cosine", "2 2", "d"),
    "relative-magnitude": ("length", "", "^"),
    "norm-ratio": ("length", "6 3", "v"),
    "last-n": ("blind", "", "v"),
    "random": ("blind", "2 2", "o"),
    "one-shot-perplexity": ("search", "2 2", "s"),
    "greedy-perplexity": ("search", "", "s"),
}
_OTHER = ("blind", "6 3", "d")
_MARKERS = {
    "o": "m-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0 -7 0z",
    "s": "m-3 -3h6v6h-6z",
    "^": "m0 -4l4 7h-8z",
    "v": "m0 4l4 -7h-8z",
    "d": "m0 -4l4 4l-4 4l-4 -4z",
}
_PROMINENT = ("simdiff", "greedy-perplexity")
# Above this multiple of the dense perplexity a model is broken, and by how much does not matter.
_BROKEN = 50
# What is so many times above the middle criterion at its number of layers would squeeze the others.
_FAR = 3
_ARROW = "m0 -9l4.5 6h-3v5h-3v-5h-3z"
_COLUMNS, _LEGEND_ROW = 4, 19


def perplexity_chart(comparison: Comparison) -> str:
    """Draw held-out perplexity without recovery, with intervals for `simdiff` and greedy search.

    The axis is logarithmic. A criterion that is far above the middle one of its number of layers,
    or 50 times the dense model, has an arrow at the upper edge.
    """
    dense, counts = comparison.dense.perplexity, comparison.counts
    measured = {
        name: {
            entry.cell.num_remove: entry.quality
            for entry in (comparison.at(name, count) for count in counts)
            if entry.quality is not None
        }
        for name in comparison.criteria
    }
    highest = max([dense, *(q.perplexity for row in measured.values() for q in row.values())])
    told = "; ".join(
        f"{name}: "
        + (
            ", ".join(f"{number_of(n, 'layer')} {plain(q.perplexity)}" for n, q in row.items())
            or "not measured"
        )
        for name, row in measured.items()
    )
    legend = _LEGEND_ROW * -(-len(measured) // _COLUMNS)
    chart = Chart(
        "Perplexity over removed layers",
        f"Held-out perplexity of every criterion. Dense {plain(dense)}; {told}.",
        height=420 + legend,
        width=760,
        bottom=52 + legend,
    )
    top = _ceiling(
        dense, [[row[n].perplexity for row in measured.values() if n in row] for n in counts]
    )
    x = Scale(counts[0] - 0.3, counts[-1] + 0.3, *chart.x_range)
    y = Scale(0.93 * dense, 1.12 * top, *chart.y_range, logarithmic=True)
    above = f"; an arrow at the edge is more than {perplexity_text(top)}" if highest > top else ""
    chart.y_axis(y, f"held-out perplexity{above}")
    chart.x_axis(x, counts, f"removed layers of {comparison.scores.num_layers}")
    chart.line(chart.left, y(dense), chart.x_range[1], y(dense), "ideal thin")
    chart.text(chart.x_range[1], y(dense) - 5, f"dense {perplexity_text(dense)}", text_anchor="end")
    far = {
        n: sum(n in row and row[n].perplexity > top for row in measured.values()) for n in counts
    }
    above_at = dict.fromkeys(counts, 0)
    for name in sorted(measured, key=_PROMINENT.__contains__):  # prominent lines are drawn last
        kind, dashes, marker = _LINES.get(name, _OTHER)
        row = measured[name]
        if name in _PROMINENT:
            upper = [(x(n), y(q.perplexity if q.high is None else q.high)) for n, q in row.items()]
            lower = [(x(n), y(q.perplexity if q.low is None else q.low)) for n, q in row.items()]
            chart.path([*upper, *reversed(lower)], f"interval {kind}")
        strong = " strong" if name in _PROMINENT else ""
        inside = [(x(n), y(q.perplexity)) for n, q in row.items() if q.perplexity <= top]
        for run in _drawn([(n, q.perplexity) for n, q in row.items()], top):
            chart.path([(x(n), y(value)) for n, value in run], f"line {kind}{strong}", dashes)
        _marks(chart, inside, f"line {kind}{strong}", _MARKERS[marker])
        for n, q in row.items():
            if q.perplexity > top:  # beside those of other criteria
                place = x(n) + 10 * (above_at[n] - (far[n] - 1) / 2)
                _marks(chart, [(place, y(1.12 * top) + 9)], f"line {kind}", _ARROW)
                above_at[n] += 1
    for index, name in enumerate(measured):
        kind, dashes, marker = _LINES.get(name, _OTHER)
        left = 8 + (index % _COLUMNS) * (chart.width - 8) / _COLUMNS
        middle = chart.height - legend + 8.0 + _LEGEND_ROW * (index // _COLUMNS)
        _line(chart, [(left, middle), (left + 30, middle)], f"line {kind}", dashes, "")
        _line(chart, [(left + 15, middle)], f"line {kind}", dashes, marker)
        chart.text(left + 36, middle + 4, name)
    return chart.render()


def _ceiling(dense: float, columns: list[list[float]]) -> float:
    """The highest perplexity that is drawn: what is far above the middle of its column is not."""
    middles = [sorted(column)[(len(column) - 1) // 2] for column in columns if column]
    wanted = min(_BROKEN * dense, _FAR * max([dense, *middles]))
    highest = max([dense, *(value for column in columns for value in column)])
    if highest <= wanted:
        return highest
    return max([1.5 * dense, *(v for column in columns for v in column if v <= wanted)])


def _drawn(points: list[tuple[int, float]], top: float) -> list[list[tuple[int, float]]]:
    """Runs of points that a line joins: not along the edge, between two that lie beyond it."""
    runs: list[list[tuple[int, float]]] = []
    for before, after in pairwise(points):
        if min(before[1], after[1]) > top:
            continue
        if runs and runs[-1][-1] == before:
            runs[-1].append(after)
        else:
            runs.append([before, after])
    return runs


def _marks(chart: Chart, points: list[tuple[float, float]], kind: str, shape: str) -> None:
    if points:
        shapes = "".join(f"M{a:.1f} {b:.1f}{shape}" for a, b in points)
        chart.add("path", f"{kind} marker", d=shapes)


def _line(
    chart: Chart, points: list[tuple[float, float]], kind: str, dashes: str, marker: str
) -> None:
    if len(points) > 1:
        chart.path(points, kind, dashes)
    if marker:
        _marks(chart, points, kind, _MARKERS[marker])
