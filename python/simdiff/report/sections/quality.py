"""The section on quality: perplexity, tasks, averages and the share retained of the dense model."""

from __future__ import annotations

import html
from collections.abc import Iterator

from simdiff.errors import number_of
from simdiff.report.cells import interval_text, quality_rows, stored_interval
from simdiff.report.html import notes_list, scrolled, table
from simdiff.report.numbers import parameters_text
from simdiff.report.sources import Content, ReportSources


def quality_section(sources: ReportSources) -> Iterator[str]:
    """Yield the HTML of the section on quality; nothing if nothing was evaluated."""
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
        rows.append(
            (
                stage,
                f"{values['perplexity']:.2f}",
                interval_text(stored_interval(values)),
                f"{values['perplexity'] / dense['perplexity']:.3f}",
                parameters_text(values["num_parameters"]),
            )
        )
    text = results["evaluation"]
    told = (
        f"{number_of(text['num_windows'], 'window')} of {text['window_length']} tokens, "
        if {"num_windows", "window_length"} <= text.keys()
        else ""
    )
    return table(("model", "perplexity", "95% interval", "× dense", "parameters"), rows) + (
        f"<p class='caption'>Perplexity of held-out text, lower is better: {html.escape(told)}"
        f"{text['num_predicted_tokens']:,} tokens predicted. Intervals by Student's t over "
        "windows.</p>"
    )


def _evaluation(content: Content) -> str:
    """A line for each measure, a column for each model, the dense one first."""
    names, rows = quality_rows(content)
    head = "".join(f"<th scope='col'>{html.escape(name)}</th>" for name in names)
    body = "".join(
        f"<tr{' class=strong' if row.group == 'averages' else ''}>"
        f"<th class='text' scope='row'>{html.escape(row.label)}</th>"
        f"{''.join(f'<td>{html.escape(cell)}</td>' for cell in row.cells)}</tr>"
        for row in rows
    )
    return scrolled(
        f"<thead><tr><th class='text' scope='col'>measure</th>{head}</tr></thead>"
        f"<tbody>{body}</tbody>"
    ) + (
        "<p class='caption'>± is one standard error; in brackets the difference from the dense "
        "model on the same items.</p>"
        if any(row.group == "tasks" for row in rows)
        else ""
    )
