"""Chart of perplexity over the number of removed layers, with a line for each criterion."""

from __future__ import annotations

from simdiff.comparison.results import Comparison
from simdiff.report.svg import Chart, Scale, number

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
_CEILING = 50
_COLUMNS, _LEGEND_ROW = 4, 19


def perplexity_chart(comparison: Comparison) -> str:
    """Draw held-out perplexity without recovery, with intervals for `simdiff` and greedy search.

    The axis is logarithmic and ends at 50 times the dense perplexity; higher values are drawn at
    its end.
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
        + (", ".join(f"{n} layers {q.perplexity:.4g}" for n, q in row.items()) or "not measured")
        for name, row in measured.items()
    )
    legend = _LEGEND_ROW * -(-len(measured) // _COLUMNS)
    chart = Chart(
        "Perplexity over removed layers",
        f"Held-out perplexity of every criterion. Dense {dense:.4g}; {told}.",
        height=420 + legend,
        width=760,
        bottom=52 + legend,
    )
    top = min(highest, _CEILING * dense)
    x = Scale(counts[0] - 0.3, counts[-1] + 0.3, *chart.x_range)
    y = Scale(0.93 * dense, 1.12 * top, *chart.y_range, logarithmic=True)
    above = f"; at the top edge: {_CEILING} times dense or more" if highest > top else ""
    chart.y_axis(y, f"held-out perplexity{above}")
    chart.x_axis(x, counts, f"removed layers of {comparison.scores.num_layers}")
    chart.line(chart.left, y(dense), chart.x_range[1], y(dense), "ideal thin")
    chart.text(
        chart.x_range[1], y(dense) - 5, f"dense {number(round(dense, 2))}", text_anchor="end"
    )
    for name in sorted(measured, key=_PROMINENT.__contains__):  # prominent lines are drawn last
        kind, dashes, marker = _LINES.get(name, _OTHER)
        row = measured[name]
        if name in _PROMINENT:
            upper = [(x(n), y(q.perplexity if q.high is None else q.high)) for n, q in row.items()]
            lower = [(x(n), y(q.perplexity if q.low is None else q.low)) for n, q in row.items()]
            chart.path([*upper, *reversed(lower)], f"interval {kind}")
        strong = " strong" if name in _PROMINENT else ""
        points = [(x(n), y(min(q.perplexity, top))) for n, q in row.items()]
        _line(chart, points, f"line {kind}{strong}", dashes, marker)
    for index, name in enumerate(measured):
        kind, dashes, marker = _LINES.get(name, _OTHER)
        left = 8 + (index % _COLUMNS) * (chart.width - 8) / _COLUMNS
        middle = chart.height - legend + 8.0 + _LEGEND_ROW * (index // _COLUMNS)
        _line(chart, [(left, middle), (left + 30, middle)], f"line {kind}", dashes, "")
        _line(chart, [(left + 15, middle)], f"line {kind}", dashes, marker)
        chart.text(left + 36, middle + 4, name)
    return chart.render()


def _line(
    chart: Chart, points: list[tuple[float, float]], kind: str, dashes: str, marker: str
) -> None:
    if len(points) > 1:
        chart.path(points, kind, dashes)
    if marker and points:
        shapes = "".join(f"M{a:.1f} {b:.1f}{_MARKERS[marker]}" for a, b in points)
        chart.add("path", f"{kind} marker", d=shapes)
