"""The section on recovery: dense, pruned and recovered perplexity, and the course of the method."""

from __future__ import annotations

import html
from collections.abc import Iterator

from simdiff.report.cells import interval_text, stored_interval
from simdiff.report.figures.recovery import (
    curve_chart,
    layer_error_chart,
    minutes,
    stages_chart,
)
from simdiff.report.html import facts_table, figure, legend, notes_list, table
from simdiff.report.sources import STAGES, Content


def recovery_section(content: Content | None, num_layers: int) -> Iterator[str]:
    """Yield the HTML of the section on recovery; nothing if there was none."""
    if content is None:
        return
    found = content["quality"]
    yield "<h2>Recovery</h2>"
    share = content.get("recovered_share")
    way = (
        ""
        if share is None
        else f" It goes {100 * share:.0f}% of the way from the plain cut back to the dense model, "
        "in log perplexity."
    )
    yield (
        f"<p>Method <b>{html.escape(str(content['method']))}</b>, "
        f"{minutes(content['seconds'])} on {html.escape(str(content['machine']))}.{way}</p>"
        f"<p class='lead'><code>{html.escape(str(content['formula']))}</code></p>"
    )
    picture = figure(
        stages_chart({stage: found[stage]["perplexity"] for stage in STAGES}),
        "Text that neither calibrated nor trained; lower is better.",
    )
    dense = found["dense"]["perplexity"]
    rows = [
        (
            stage,
            f"{found[stage]['perplexity']:.2f}",
            interval_text(stored_interval(found[stage])),
            f"{found[stage]['perplexity'] / dense:.3f}",
        )
        for stage in STAGES
    ]
    numbers = table(("model", "perplexity", "95% interval", "× dense"), rows)
    yield f"<div class='pair'>{picture}<div>{numbers}</div></div>"
    yield notes_list(map(str, content["notes"]))
    yield from _training(content["details"].get("training"))
    for details in (content["details"], content["details"].get("start") or {}):
        yield from _closed_form(details, num_layers)
    settings = facts_table(content["settings"])
    yield f"<details><summary>Settings</summary>{settings}</details>"


def _training(training: Content | None) -> Iterator[str]:
    if not training:
        return
    curve = training.get("curve", ())
    best = training.get("best_step")
    chart = curve_chart(curve, best)
    if chart is not None:
        key = legend(
            {"trained": "training, mean since the point before", "apart": "examples set apart"}
        )
        caption = (
            f"Round: loss in training. Square: loss on examples set apart. Ring: step {best}, "
            f"whose weights were taken. Ended because {html.escape(str(training.get('stopped')))}."
        )
        yield figure(f"{key}{chart}", caption, title="Loss over training", kind="wide")
    rows = [
        (
            str(point["step"]),
            f"{point['tokens']:,}",
            minutes(point["seconds"]),
            "" if point["train_loss"] is None else f"{point['train_loss']:.4f}",
            "" if point["set_apart_loss"] is None else f"{point['set_apart_loss']:.4f}",
        )
        for point in curve
    ]
    if rows:
        columns = ("step", "tokens", "time", "training loss", "loss set apart")
        yield (
            "<details><summary>The curve in numbers, nats per token</summary>"
            f"{table(columns, rows, text=())}</details>"
        )


def _closed_form(details: Content, num_layers: int) -> Iterator[str]:
    chart = layer_error_chart(details.get("layers", ()), num_layers)
    if chart is None:
        return
    caption = (
        "Squared distance to the dense model's states at each depth after the correction, over the "
        "one before it, on windows that were not fitted; 1 is no help."
    )
    yield figure(chart, caption, title="What each corrected layer leaves", kind="wide")
    within = [
        (str(layer["layer"]), ", ".join(part["modules"]), f"{part['relative_error']:.3f}")
        for layer in details["layers"]
        for part in layer.get("parts", ())
    ]
    if within:
        heads = ("layer", "modules", "squared error after / before")
        yield (
            "<details><summary>Within the layers, behind a cut: what modules read, or the stream "
            "that one writes to, against the dense model's</summary>"
            f"{table(heads, within, text=(1,))}</details>"
        )
    losses = [loss for loss in details.get("losses", ()) if loss["nll"] is not None]
    if losses:
        rows = [(str(loss["corrected"]), f"{loss['nll']:.4f}") for loss in losses]
        columns = ("layers corrected", "loss on windows not fitted, nats per token")
        yield (
            "<details><summary>Down to which depth corrections help: "
            f"{html.escape(str(details.get('corrected')))} layers were corrected</summary>"
            f"{table(columns, rows, text=())}</details>"
        )
