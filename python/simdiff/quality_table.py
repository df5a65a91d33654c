"""The table of `simdiff eval`: a line for each measure, a column for each model."""

from __future__ import annotations

from rich.table import Table

from simdiff.quality import ModelComparison, ModelQuality, Quality
from simdiff.task_scores import TaskAverage, TaskScore


def quality_table(quality: Quality) -> Table:
    """Perplexity and tasks of every model, and what is retained of the dense one."""
    table = Table(title=f"Quality; dense: {quality.dense.name}", title_justify="left")
    table.add_column("")
    for model in quality.models:
        table.add_column(model.name, justify="right", overflow="fold")
    found = [quality.against_dense(model) for model in quality.models]
    models = quality.models
    table.add_row("parameters, M", *(f"{model.num_parameters / 1e6:.1f}" for model in models))
    if quality.dense.perplexity is not None:
        table.add_section()
        table.add_row("perplexity, 95%", *map(_perplexity, models))
        if len(models) > 1:
            table.add_row("  × dense, 95%", "", *map(_ratio, found[1:]))
    if quality.dense.tasks:
        table.add_section()
        for name, score in quality.dense.tasks.items():
            cells = [_score(model, name, one) for model, one in zip(models, found, strict=True)]
            table.add_row(_label(name, score), _accuracy(score), *cells[1:])
        table.add_section()
        for label, averages in (
            ("average of all", [one.all_tasks for one in found]),
            ("average without tasks at chance", [one.above_chance for one in found]),
        ):
            table.add_row(f"{label} ({len(averages[0].tasks)})", *map(_average, averages))
            if len(models) > 1:
                table.add_row("  retained", "", *map(_retained, averages[1:]))
    return table


def _perplexity(model: ModelQuality) -> str:
    value = model.perplexity
    if value is None:
        return ""
    limits = "" if value.low is None else f"  {value.low:.2f} to {value.high:.2f}"
    return f"{value.perplexity:.3f}{limits}"


def _ratio(found: ModelComparison) -> str:
    value = found.perplexity
    if value is None:
        return "other tokens"
    return f"{value.ratio:.3f}" + (
        "" if value.low is None else f"  {value.low:.3f} to {value.high:.3f}"
    )


def _label(name: str, score: TaskScore) -> str:
    mark = ", dense at chance" if score.at_chance else ""
    return f"{name}, {score.metric}, % (chance {100 * score.chance:.1f}{mark})"


def _accuracy(score: TaskScore) -> str:
    return _with_error(score.value, score.standard_error)


def _score(model: ModelQuality, name: str, found: ModelComparison) -> str:
    """A score and, in brackets, its difference from the dense one's on the same items."""
    gap = found.differences[name]
    return (
        f"{_accuracy(model.tasks[name])}  ({_with_error(gap.value, gap.standard_error, sign='+')})"
    )


def _average(value: TaskAverage) -> str:
    return "none" if value.average is None else _with_error(value.average, value.standard_error)


def _retained(value: TaskAverage) -> str:
    if value.retained is None:
        return "none"
    return f"{_with_error(value.retained, value.retained_error)} %"


def _with_error(value: float, error: float | None, sign: str = "") -> str:
    return f"{100 * value:{sign}.1f}" + ("" if error is None else f" ± {100 * error:.1f}")
