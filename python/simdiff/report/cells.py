"""Cells of tables as text, the same on a page and in the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from simdiff.evaluation.task_scores import CLASSIFICATION, GENERATION
from simdiff.models.layer_indices import spans
from simdiff.planning.plan import PruningPlan
from simdiff.report.numbers import duration, parameters_text, perplexity_text, plain, ratio_text
from simdiff.scoring.scores import LayerScores

if TYPE_CHECKING:
    from simdiff.comparison.results import ComparedCell


def cell_texts(entry: ComparedCell) -> list[str]:
    """One cell of the comparison as text: the row of the table here and on the terminal."""
    quality = entry.quality
    removed = spans(entry.removed)
    if quality is None:
        numbers = ["none", "", "", ""]
        removed = f"{removed}: {entry.problem}" if removed else str(entry.problem)
    else:
        numbers = [
            perplexity_text(quality.perplexity),
            _interval(quality.low, quality.high, perplexity_text),
            ratio_text(quality.ratio),
            _interval(quality.ratio_low, quality.ratio_high, ratio_text),
        ]
    count, name = str(entry.cell.num_remove), entry.cell.criterion
    return [count, name, *numbers, duration(entry.cell.seconds), removed]


def _interval(low: float | None, high: float | None, shown: Callable[[float], str]) -> str:
    return "" if low is None or high is None else f"{shown(low)}–{shown(high)}"


def layer_cells(scores: LayerScores, plan: PruningPlan, layer: int) -> list[str]:
    """The numbers of one layer, formatted: the columns of the table here and on the terminal."""
    cosine, squared = scores.metrics["cosine_distance"], scores.metrics["squared_difference"]
    error = cosine.error[layer]
    return [
        str(layer),
        plain(cosine.mean[layer]),
        "" if error is None else f"{error:.1g}",
        plain(squared.mean[layer]),
        plain(squared.maximum[layer]),
        plain(scores.metrics["absolute_difference"].mean[layer]),
        plain(scores.metrics["relative_difference"].mean[layer]),
        plain(plan.importance[layer], 6) if plan.importance else "",
        *([f"{plan.draws.plan_frequency[layer]:.0%}"] if plan.draws is not None else []),
    ]


# What stands for some keys of a model's identity.
_FACTS = {"embedding_parameters": "parameters of an embedding of which decoding reads one row"}


def model_facts(model: Mapping[str, Any]) -> dict[str, Any]:
    """What a page tells of the identity of a model."""
    facts = {
        f"model {_FACTS.get(key, key)}": value
        for key, value in model.items()
        if not isinstance(value, (list, dict))
    }
    weights = model.get("weights") or {}
    return facts | {f"model weights, by {key}": value for key, value in weights.items()}


def stored_interval(values: Mapping[str, Any]) -> tuple[float, float] | None:
    """The 95% interval of a perplexity in a file of results; None where it has none."""
    low, high = values.get("low"), values.get("high")
    return None if low is None or high is None else (low, high)


def interval_text(interval: tuple[float, float] | None) -> str:
    """An interval in words, empty where there is none."""
    return "" if interval is None else f"{interval[0]:.2f} to {interval[1]:.2f}"


def _with_error(value: float, error: float | None, sign: str = "") -> str:
    return f"{100 * value:{sign}.1f}" + ("" if error is None else f" ± {100 * error:.1f}")


@dataclass(frozen=True)
class QualityRow:
    """A line of the table of `simdiff eval`: a label and a cell for each model."""

    label: str
    cells: tuple[str, ...]
    group: str
    """"size", "perplexity", "tasks" or "averages"."""


_CHANCE = "average without tasks at chance"
AVERAGES = {
    "": {"all_tasks": "average of all tasks", "above_chance": _CHANCE},
    CLASSIFICATION: {
        "all_tasks": f"{CLASSIFICATION}, average of all tasks",
        "above_chance": f"{CLASSIFICATION}, {_CHANCE}",
    },
    GENERATION: {
        "all_tasks": f"{GENERATION}, average of all tasks",
        "above_chance": f"{GENERATION}, average without tasks near 0",
    },
}
"""The averages of each kind of task in a file of results, and their labels."""


def averages_by_kind(model: Mapping[str, Any]) -> dict[str, Any]:
    """The averages of a model, by kind of task; a file of version 2 has them of no kind, `""`."""
    found = model.get("averages", {})
    return {"": found} if "all_tasks" in found else dict(found)


def _task_label(name: str, task: Mapping[str, Any]) -> str:
    if task["chance"]:
        mark = ", dense at chance" if task.get("at_chance") else ""
        told = f"chance {100 * task['chance']:.1f}{mark}"
    else:
        told = "written" + (", dense near 0: nothing to retain" if task.get("at_chance") else "")
    return f"{name}, {task['metric']}, % ({told})"


def quality_rows(content: Mapping[str, Any]) -> tuple[list[str], list[QualityRow]]:
    """Names of the models, the dense one first, and the lines of their table.

    Args:
        content: of a file of results, see `Quality.to_dict`.
    """
    models: Mapping[str, Any] = content["models"]
    first = content.get("dense", next(iter(models)))
    names = [first, *(name for name in models if name != first)]
    columns = [models[name] for name in names]
    dense = columns[0]
    rows = [QualityRow("parameters", tuple(map(_size, columns)), "size")]

    def add(label: str, cells: Iterable[str], group: str) -> None:
        rows.append(QualityRow(label, tuple(cells), group))

    if "perplexity" in dense:
        add("perplexity, 95% interval", map(_perplexity, columns), "perplexity")
        if len(columns) > 1:
            ratios = (_ratio_to_dense(model, dense) for model in columns[1:])
            add("× dense, 95% interval", ("", *ratios), "perplexity")
    for name, task in dense.get("tasks", {}).items():
        add(
            _task_label(name, task),
            (_task(model, name, model is dense) for model in columns),
            "tasks",
        )
    for kind, found in averages_by_kind(dense).items():
        for key, label in AVERAGES[kind].items():
            averages = [averages_by_kind(model).get(kind, {}).get(key, {}) for model in columns]
            means = (_percent(one, "average", "standard_error") for one in averages)
            add(f"{label} ({len(found[key]['tasks'])}), %", means, "averages")
            if len(columns) > 1:
                kept = (_percent(one, "retained", "retained_error") for one in averages[1:])
                add("retained of dense, %", ("", *kept), "averages")
    return names, rows


def _size(model: Mapping[str, Any]) -> str:
    count = model.get("num_parameters")
    return "" if count is None else parameters_text(count)


def _perplexity(model: Mapping[str, Any]) -> str:
    if "perplexity" not in model:
        return ""
    interval = interval_text(stored_interval(model))
    return f"{model['perplexity']:.2f}" + (f" ({interval})" if interval else "")


def _ratio_to_dense(model: Mapping[str, Any], dense: Mapping[str, Any]) -> str:
    found = model.get("against_dense")
    if found is None:
        same = "perplexity" in model and model.get("evaluation") == dense.get("evaluation")
        return f"{model['perplexity'] / dense['perplexity']:.3f}" if same else "other tokens"
    if found.get("low") is None:
        return f"{found['ratio']:.3f}"
    return f"{found['ratio']:.3f} ({found['low']:.3f} to {found['high']:.3f})"


def _task(model: Mapping[str, Any], name: str, is_dense: bool) -> str:
    """A score and, in brackets, its difference from the dense one's on the same items."""
    score = model.get("tasks", {}).get(name)
    if score is None:
        return ""
    text = _with_error(score["value"], score.get("standard_error"))
    gap = score.get("difference")
    if is_dense or gap is None:
        return text
    return f"{text} ({_with_error(gap['value'], gap.get('standard_error'), '+')})"


def _percent(average: Mapping[str, Any], value: str, error: str) -> str:
    found = average.get(value)
    return "none" if found is None else _with_error(found, average.get(error))
