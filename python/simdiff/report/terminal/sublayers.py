"""Tables and lines for the scores and plans of sub-layers."""

from __future__ import annotations

from simdiff.report.numbers import plain
from simdiff.report.terminal.fitting import Fitting, plain_table
from simdiff.scoring.scores import LayerScores
from simdiff.sublayers.plan import SublayerPlan
from simdiff.sublayers.scores import SublayerScores

_COLUMNS = ("sub-layer", "1-cos", "norm change", "MSSD", "max sq.", "MASD", "rel.")


def sublayers_table(scores: LayerScores, plan: SublayerPlan | None = None) -> Fitting:
    """A table of every sub-layer with its scores, and whether and why a plan removes it."""
    found = SublayerScores.from_scores(scores)
    table = plain_table(f"{scores.model['name']}: every sub-layer, layers counted from 0")
    for column in (*_COLUMNS, *(("importance", "decision") if plan else ())):
        table.add_column(column, justify="right" if column != "decision" else "left", no_wrap=True)
    metrics = found.metrics
    for row, name in enumerate(found.names):
        if plan is not None and name not in plan.ranking:
            continue
        values = [
            metrics["cosine_distance"].mean[row],
            found.norm_change[row],
            metrics["squared_difference"].mean[row],
            metrics["squared_difference"].maximum[row],
            metrics["absolute_difference"].mean[row],
            metrics["relative_difference"].mean[row],
        ]
        cells = [str(name), *(plain(value) for value in values)]
        gone = plan is not None and name in plan.removed
        if plan is not None:
            cells.append(plain(plan.importance[plan.ranking.index(name)]))
            cells.append(f"{'REMOVE' if gone else 'keep'}: {plan.reason(name)}")
        table.add_row(*cells, style="bold red" if gone else None)
    return Fitting(table, ("norm change", "rel.", "MASD", "max sq.", "MSSD"))


def plan_lines(plan: SublayerPlan) -> list[str]:
    """The sub-layers that a plan removes and its notes, line by line."""
    alpha = "" if plan.alpha is None else f", alpha = {plan.alpha:g}"
    return [
        f"Removed, the least important first: {', '.join(map(str, plan.removed))}",
        f"Why: lowest by {plan.criterion}{alpha}: {plan.formula}",
        *(f"Note: {note}." for note in plan.notes),
        "",
    ]
