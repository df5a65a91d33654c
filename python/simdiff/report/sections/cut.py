"""The sections on the cut: the layers in a row, the plans tried, every layer with its reason."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator

from simdiff.models.layer_indices import spans
from simdiff.planning.plan import PruningPlan
from simdiff.report.cells import layer_cells
from simdiff.report.figures.depth import importance_chart
from simdiff.report.html import figure, legend, notes_list, scrolled, table
from simdiff.report.numbers import plain
from simdiff.scoring.scores import LayerScores


def cut_section(plan: PruningPlan) -> Iterator[str]:
    """Yield the HTML of the section on the cut."""
    alpha = "" if plan.alpha is None else f", α = {plan.alpha:g}"
    yield "<h2>What was cut, and why</h2>"
    yield _strip(plan)
    if plan.by_hand:
        yield "<p>The layers were named by hand, not chosen by scores.</p>"
        yield notes_list(plan.notes)
        return
    yield (
        f"<p>Criterion <b>{html.escape(plan.criterion)}</b>{alpha}, selection "
        f"<b>{html.escape(plan.selection)}</b>. Importance of a layer with input x and output y: "
        f"<code>{html.escape(plan.formula)}</code>.</p>"
    )
    yield notes_list(plan.notes)
    caption = (
        "Mean over calibration tokens. Crosses on a band are the removed layers. Whole blocks are "
        "chosen by the cost of the block, so a removed layer need not be among the lowest."
        if plan.selection != "lowest"
        else "Crosses on a band are the removed layers: the lowest that may go."
    )
    picture = figure(importance_chart(plan), caption, title="Importance over depth")
    tried = _candidates(plan)
    yield f"<div class='pair'>{picture}{tried}</div>" if tried else picture


def _strip(plan: PruningPlan) -> str:
    """A row with a cell for each layer, which wraps on narrow screens to stay readable."""
    cells, kinds = [], {}
    for layer in range(plan.num_layers):
        kind, told = _fate(plan, layer)
        kinds[kind] = told
        words = f"<span class='hidden'>: {told}</span>"
        reason = html.escape(f"layer {layer}: {told}, {plan.reason(layer)}", quote=True)
        cells.append(f'<li class="{kind}" title="{reason}">{layer}{words}</li>')
    order = ("removed", "kept", "protected")
    shown = {kind: kinds[kind] for kind in order if kind in kinds}
    return (
        f"<ol class='strip' aria-label='Decoder layers from first to last'>{''.join(cells)}</ol>"
        f"{legend(shown)}"
    )


def _fate(plan: PruningPlan, layer: int) -> tuple[str, str]:
    if layer in plan.removed:
        return "removed", "removed"
    if layer in plan.protected:
        return "protected", "kept because it was protected"
    return "kept", "kept"


def _candidates(plan: PruningPlan) -> str:
    """A table of the plans that were tried, best first; empty if nothing was evaluated."""
    tried = [c for c in plan.candidates if c.get("nll") is not None]
    if not tried:
        return ""
    # Losses on different numbers of windows are not comparable. Plans with more windows come first,
    # since these windows decided.
    ordered = sorted(tried, key=lambda c: (-int(c.get("num_windows", 0)), c["nll"]))
    rows = [
        (
            f"{candidate['nll']:.3f}"
            if plan.search
            else f"{math.exp(min(candidate['nll'], 700)):.2f}",
            str(candidate.get("num_windows", "")),
            spans(candidate["removed"]),
            str(candidate.get("origin", "")) + (" (taken)" if _is_chosen(plan, candidate) else ""),
        )
        for candidate in ordered
    ]
    measure = "rise of loss" if plan.search else "perplexity"
    columns = (measure, "windows", "removed layers", "origin")
    return (
        f"<div><h3>Plans tried: {len(rows)}</h3>"
        f"{table(columns, rows, text=(2, 3), wrap=(3,))}"
        f"<p class='caption'>{measure.capitalize()} on calibration windows, which is what chose; "
        "numbers on "
        "different numbers of windows do not compare. Held-out text was not looked at.</p></div>"
    )


def _is_chosen(plan: PruningPlan, candidate: dict[str, object]) -> bool:
    removed = candidate["removed"]
    return isinstance(removed, list) and sorted(removed) == sorted(plan.removed)


def layers_section(plan: PruningPlan, scores: LayerScores | None) -> Iterator[str]:
    """Yield the HTML of the table of all layers, with their reasons and numbers."""
    yield "<h2>Every layer and its reason</h2>"
    columns = ["in draws"] * (plan.draws is not None) + ["importance"] * bool(plan.importance)
    if scores is not None:
        columns += ["1 − cos", "± s.e.", "MSSD", "max ‖y−x‖²", "MASD", "‖y−x‖/‖x‖"]
    heads = "<th class='text' scope='col'>decision</th>"
    heads += "".join(f"<th scope='col'>{name}</th>" for name in columns)
    rows = []
    for layer in range(plan.num_layers):
        gone = layer in plan.removed
        fate = f"{'removed' if gone else 'kept'}: {html.escape(plan.reason(layer))}"
        numbers = [plain(plan.importance[layer], 6)] if plan.importance else []
        if plan.draws is not None:
            numbers.insert(0, f"{plan.draws.plan_frequency[layer]:.0%}")
        if scores is not None:
            numbers += layer_cells(scores, plan, layer)[1:7]
        cells = "".join(f"<td>{value}</td>" for value in numbers)
        rows.append(
            f"<tr{' class=removed' if gone else ''}><td>{layer}</td>"
            f"<td class='text'>{fate}</td>{cells}</tr>"
        )
    yield scrolled(
        f"<thead><tr><th scope='col'>layer</th>{heads}</tr></thead><tbody>{''.join(rows)}</tbody>"
    )
