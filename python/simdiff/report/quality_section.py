"""The section of quality: perplexity, tasks, averages and what is retained of the dense model."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from simdiff.evaluation import exponential
from simdiff.report.sources import Content, ReportSources
from simdiff.report.style import notes_list, scrolled, table

# Two-sided 95% of the normal distribution.
_Z = 1.959964


def quality(sources: ReportSources) -> Iterator[str]:
    """The section's parts; none where nothing was evaluated."""
    if sources.evaluation is None and sources.results is None:
        return
    yield "<h2>Quality</h2>"
    if sources.evaluation is not None:
        yield _evaluation(sources.evaluation)
        yield notes_list(map(str, sources.evaluation.get("notes", ())))
    if sources.results is not None:
        if sources.evaluation is not None:
            yield "<h3>Held-out perplexity of the run itself</h3>"
        yield _run(sources.results)


def _run(results: Content) -> str:
    dense = results["dense"]
    rows = []
    for stage in ("dense", "pruned"):
        values = results[stage]
        rows.append((
            stage,
            f"{values['perplexity']:.2f}",
            interval_text(perplexity_interval(values)),
            f"{values['perplexity'] / dense['perplexity']:.3f}",
            f"{values['num_parameters'] / 1e6:.1f} M",
        ))  # fmt: skip
    text = results["evaluation"]
    told = (
        f"{text['num_windows']} windows of {text['window_length']} tokens, "
        if {"num_windows", "window_length"} <= text.keys()
        else ""
    )
    return table(("model", "perplexity", "95% interval", "× dense", "parameters"), rows) + (
        f"<p class='caption'>Perplexity of held-out text, lower is better: {told}"
        f"{text['num_predicted_tokens']:,} tokens predicted. Intervals: exp(nll ± 1.96 standard "
        "errors over windows).</p>"
    )


def perplexity_interval(values: Mapping[str, Any]) -> tuple[float, float] | None:
    """The one in the file, or from the standard error of the loss; None without either."""
    if values.get("low") is not None and values.get("high") is not None:
        return values["low"], values["high"]
    error = values.get("standard_error")
    if error is None:
        return None
    nll = values["nll"]
    return exponential(nll - _Z * error), exponential(nll + _Z * error)


def interval_text(interval: tuple[float, float] | None) -> str:
    """An interval in words, empty where there is none."""
    return "" if interval is None else f"{interval[0]:.2f} to {interval[1]:.2f}"


def _evaluation(content: Content) -> str:
    """A line for each measure, a column for each model, the dense one first."""
    models: Mapping[str, Any] = content["models"]
    first = content.get("dense", next(iter(models)))
    names = [first, *(name for name in models if name != first)]
    columns = [models[name] for name in names]
    dense = columns[0]
    rows = [_row("parameters", [_size(model) for model in columns])]
    if "perplexity" in dense:
        rows.append(_row("perplexity, 95% interval", [_perplexity(model) for model in columns]))
        rows.append(_row("× dense, 95% interval", ["", *(_ratio(m, dense) for m in columns[1:])]))
    for name, task in dense.get("tasks", {}).items():
        mark = ", dense at chance" if task.get("at_chance") else ""
        label = f"{name}, {task['metric']}, % (chance {100 * task['chance']:.1f}{mark})"
        rows.append(_row(label, [_task(model, name, model is dense) for model in columns]))
    if dense.get("tasks"):
        for key, label in (("all_tasks", "average of all tasks"),
                           ("above_chance", "average without tasks at chance")):  # fmt: skip
            count = len(dense["averages"][key]["tasks"])
            averages = [model.get("averages", {}).get(key, {}) for model in columns]
            means = [_percent(one, "average", "standard_error") for one in averages]
            rows.append(_row(f"{label} ({count}), %", means, strong=True))
            kept = [_percent(a, "retained", "retained_error") for a in averages[1:]]
            rows.append(_row("retained of dense, %", ["", *kept], strong=True))
    head = "".join(f"<th scope='col'>{html.escape(name)}</th>" for name in names)
    return scrolled(
        f"<thead><tr><th class='text' scope='col'>measure</th>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody>"
    ) + (
        "<p class='caption'>± is one standard error; in brackets the difference from the dense "
        "model on the same items.</p>"
        if dense.get("tasks")
        else ""
    )


def _row(label: str, cells: Sequence[str], *, strong: bool = False) -> str:
    kind = " class='strong'" if strong else ""
    values = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
    return f"<tr{kind}><th class='text' scope='row'>{html.escape(label)}</th>{values}</tr>"


def _size(model: Content) -> str:
    count = model.get("num_parameters")
    return "" if count is None else f"{count / 1e6:.1f} M"


def _perplexity(model: Content) -> str:
    if "perplexity" not in model:
        return ""
    interval = interval_text(perplexity_interval(model))
    return f"{model['perplexity']:.2f}" + (f" ({interval})" if interval else "")


def _ratio(model: Content, dense: Content) -> str:
    found = model.get("against_dense")
    if found is None:
        same = "perplexity" in model and model.get("evaluation") == dense.get("evaluation")
        return f"{model['perplexity'] / dense['perplexity']:.3f}" if same else ""
    limits = "" if found["low"] is None else f" ({found['low']:.3f} to {found['high']:.3f})"
    return f"{found['ratio']:.3f}{limits}"


def _task(model: Content, name: str, is_dense: bool) -> str:
    score = model.get("tasks", {}).get(name)
    if score is None:
        return ""
    text = _with_error(score["value"], score.get("standard_error"))
    gap = score.get("difference")
    if is_dense or gap is None:
        return text
    return f"{text} ({_with_error(gap['value'], gap.get('standard_error'), '+')})"


def _percent(average: Content, value: str, error: str) -> str:
    found = average.get(value)
    return "none" if found is None else _with_error(found, average.get(error))


def _with_error(value: float, error: float | None, sign: str = "") -> str:
    return f"{100 * value:{sign}.1f}" + ("" if error is None else f" ± {100 * error:.1f}")
