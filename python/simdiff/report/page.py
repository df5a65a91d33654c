"""The report: one HTML page without references to anything outside it."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from simdiff.plan_confidence import AmountOfText
from simdiff.report.confidence import confidence_plot, confidence_text
from simdiff.report.plots import importance_plot, metrics_plot
from simdiff.scores import LayerScores
from simdiff.selection import PruningPlan

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #5b6570; --paper: #fbfbf9;
  --card: #ffffff; --line: #dfe3e6; --removed: #b3371f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --soft: #a3adb8; --paper: #15181c;
  --card: #1e2227; --line: #343a41; --removed: #ff8a70; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0.5rem 0; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 0.6rem; }
p.lead { color: var(--soft); margin-top: 0; }
p.caption { color: var(--soft); font-size: 0.88rem; margin-top: 0.6rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(12rem, 1fr)); gap: 0.8rem; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: 0.8rem 1rem; }
.tile .name { color: var(--soft); font-size: 0.85rem; }
.tile .value { font-size: 1.35rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.tile .detail { color: var(--soft); font-size: 0.85rem; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 8px;
  background: var(--card); }
table { border-collapse: collapse; width: 100%; font-size: 0.88rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.7rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
tr:last-child td { border-bottom: 0; }
th { color: var(--soft); font-weight: 600; }
td.text, th.text { text-align: left; }
td.wrap { white-space: normal; overflow-wrap: anywhere; }
tr.removed td { color: var(--removed); font-weight: 600; }
.note { border-left: 3px solid var(--removed); padding: 0.2rem 0.9rem; margin: 0.6rem 0; }
figure { margin: 0.8rem 0; background: #ffffff; border: 1px solid var(--line); border-radius: 8px;
  padding: 0.5rem; }
figure img { width: 100%; height: auto; display: block; }
figure.wide { overflow-x: auto; }
figure.wide img { min-width: 44rem; }
summary { cursor: pointer; margin: 0.3rem 0; }
blockquote { margin: 0; padding: 0.2rem 0.9rem; border-left: 3px solid var(--line); }
"""


def write_report(
    directory: Path, scores: LayerScores, plan: PruningPlan, results: Mapping[str, Any]
) -> None:
    """Write report.html, importance.png and metrics.png into a directory."""
    plots = {
        "importance.png": importance_plot(plan),
        "metrics.png": metrics_plot(scores, plan),
    }
    for name, png in plots.items():
        (directory / name).write_bytes(png)
    page = render_page(scores, plan, results, plots)
    (directory / "report.html").write_text(page, encoding="utf-8")


def render_page(
    scores: LayerScores,
    plan: PruningPlan,
    results: Mapping[str, Any],
    plots: Mapping[str, bytes],
) -> str:
    """The page as text; pictures are embedded."""
    name = html.escape(str(scores.model["name"]))
    removed = ", ".join(map(str, sorted(plan.removed)))
    sections = [
        f"<h1>{name}: {len(plan.removed)} of {plan.num_layers} layers removed</h1>",
        f"<p class='lead'>Removed: {removed} (counted from 0). Criterion {plan.criterion}"
        f"{'' if plan.alpha is None else f', α = {plan.alpha:g}'}: "
        f"<code>{html.escape(plan.formula)}</code>.</p>",
        *(f"<p class='note'>{html.escape(note)}.</p>" for note in plan.notes),
        f"<div class='tiles'>{''.join(_tiles(results))}</div>",
        "<h2>Importance</h2>",
        figure(plots["importance.png"], f"Importance over depth; removed layers: {removed}."),
        *_confidence(plan, results),
        "<h2>Metrics over depth</h2>",
        figure(
            plots["metrics.png"],
            "Mean and maximum over tokens of cosine, squared, absolute and relative difference "
            "of every layer; log axis where values span more than a factor of 30.",
        ),
        "<h2>Every layer</h2>",
        layer_table(scores, plan),
        "<h2>What the pruned model writes</h2>",
        _generation(results),
        "<h2>Where this comes from</h2>",
        _provenance(scores, results),
    ]
    return document(name, sections)


def _confidence(plan: PruningPlan, results: Mapping[str, Any]) -> Iterable[str]:
    amounts = [AmountOfText(**amount) for amount in results.get("amounts_of_text", ())]
    if plan.confidence is not None and amounts:
        yield "<h2>How sure the plan is</h2>"
        picture = confidence_plot(plan.confidence, amounts)
        yield figure(picture, confidence_text(plan.confidence, amounts))


def document(title: str, sections: Iterable[str]) -> str:
    """A whole page around sections of HTML; `title` is escaped already."""
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<link rel='icon' href='data:,'><title>simdiff: {title}</title><style>{_STYLE}</style>"
        f"</head><body><main>\n{chr(10).join(sections)}\n</main></body></html>\n"
    )


def _tiles(results: Mapping[str, Any]) -> Iterable[str]:
    dense, pruned = results["dense"], results["pruned"]
    yield tile(
        "held-out perplexity",
        f"{dense['perplexity']:.2f} → {pruned['perplexity']:.2f}",
        f"{results['evaluation']['num_predicted_tokens']} tokens predicted",
    )
    for phase, what in (("decode", "one sequence, KV cache"), ("prefill", "prompt")):
        before, after = dense["speed"][phase], pruned["speed"][phase]
        yield tile(
            f"{phase} tokens per second",
            f"{before:.0f} → {after:.0f}",
            f"{after / before:.2f} times, {what}",
        )
    before, after = dense["num_parameters"], pruned["num_parameters"]
    yield tile("parameters", f"{before / 1e6:.0f} M → {after / 1e6:.0f} M",
                f"{100 * (1 - after / before):.0f}% fewer")  # fmt: skip


def tile(name: str, value: str, detail: str) -> str:
    """A number with its name and what it means."""
    return (
        f"<div class='tile'><div class='name'>{name}</div><div class='value'>{value}</div>"
        f"<div class='detail'>{detail}</div></div>"
    )


def figure(png: bytes, description: str, *, wide: bool = False) -> str:
    """An embedded picture with its text alternative, which is escaped already.

    A wide one scrolls on a narrow screen instead of shrinking until it cannot be read.
    """
    data = base64.b64encode(png).decode()
    kind = " class='wide'" if wide else ""
    return f"<figure{kind}><img alt='{description}' src='data:image/png;base64,{data}'></figure>"


def layer_table(scores: LayerScores, plan: PruningPlan) -> str:
    """Every layer with its metrics, its importance and its fate."""
    head = (
        "<th>layer</th><th>1 − cos</th><th>± s.e.</th><th>MSSD</th><th>max ‖y−x‖²</th>"
        "<th>MASD</th><th>‖y−x‖/‖x‖</th><th>importance</th>"
        f"{'' if plan.confidence is None else '<th>in plan</th>'}<th class='text'>decision</th>"
    )
    rows = []
    for layer in range(plan.num_layers):
        gone = layer in plan.removed
        cells = "".join(f"<td>{value}</td>" for value in layer_cells(scores, plan, layer))
        fate = f"<td class='text'>{'removed' if gone else 'kept'}: {plan.reason(layer)}</td>"
        rows.append(f"<tr{' class=removed' if gone else ''}>{cells}{fate}</tr>")
    return f"<div class='scroll'><table><tr>{head}</tr>{''.join(rows)}</table></div>"


def layer_cells(scores: LayerScores, plan: PruningPlan, layer: int) -> list[str]:
    """The numbers of one layer, formatted: the columns of the table here and on the terminal."""
    cosine, squared = scores.metrics["cosine_distance"], scores.metrics["squared_difference"]
    error = cosine.error[layer]
    cells = [
        str(layer),
        f"{cosine.mean[layer]:.4g}",
        "" if error is None else f"{error:.1g}",
        f"{squared.mean[layer]:.4g}",
        f"{squared.maximum[layer]:.4g}",
        f"{scores.metrics['absolute_difference'].mean[layer]:.4g}",
        f"{scores.metrics['relative_difference'].mean[layer]:.4g}",
        f"{plan.importance[layer]:.6g}",
    ]
    if plan.confidence is not None:
        cells.append(f"{plan.confidence.plan_frequency[layer]:.0%}")
    return cells


def _generation(results: Mapping[str, Any]) -> str:
    sample = results["pruned"]["generation"]
    check = "agrees" if sample["equals_uncached"] else "DISAGREES"
    return (
        f"<blockquote><b>{html.escape(sample['prompt'])}</b>{html.escape(sample['text'])}"
        f"</blockquote><p>Greedy, with the KV cache; every token {check} with a forward without "
        "cache.</p>"
    )


def _provenance(scores: LayerScores, results: Mapping[str, Any]) -> str:
    facts = {
        **{f"model {key}": value for key, value in scores.model.items()},
        **{f"calibration {key}": value for key, value in scores.calibration.items()},
        **{f"held-out {key}": value for key, value in results["evaluation"].items()},
        "scored with": f"backend {scores.provenance['backend']} on {scores.provenance['device']}",
        "speed": f"{results['dense']['speed']['repeats']} interleaved repetitions, medians, "
        f"{results['dense']['speed']['num_threads']} threads, {results['machine']}",
        **{f"version of {key}": value for key, value in results["versions"].items()},
    }
    return facts_table(facts)


def facts_table(facts: Mapping[str, Any]) -> str:
    """Names and values, as a table."""
    rows = "".join(
        f"<tr><td class='text'>{html.escape(key.replace('_', ' '))}</td>"
        f"<td class='text wrap'>{html.escape(str(value))}</td></tr>"
        for key, value in facts.items()
    )
    return f"<div class='scroll'><table>{rows}</table></div>"
