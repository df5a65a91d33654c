"""The report: one self-contained HTML page of whichever files there are."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simdiff.errors import number_of
from simdiff.planning.plan import PruningPlan
from simdiff.provenance.card import reproduction
from simdiff.report.cells import interval_text, model_facts, stored_interval
from simdiff.report.figures.depth import metric_charts
from simdiff.report.html import document, facts_table, figure, tile
from simdiff.report.numbers import parameters_text, speed_text
from simdiff.report.sections.confidence import confidence_section
from simdiff.report.sections.cut import cut_section, layers_section
from simdiff.report.sections.map import map_section
from simdiff.report.sections.quality import quality_section
from simdiff.report.sections.recovery import recovery_section
from simdiff.report.sections.speed import speed_pairs, speed_section
from simdiff.report.sources import (
    ReportSources,
    model_path,
    pruned_parameters,
    read_sources,
)
from simdiff.report.speed_notes import busy_note, measured_by
from simdiff.scoring.scores import LayerScores

if TYPE_CHECKING:
    from simdiff.comparison.results import Comparison

REPORT = "report.html"


def write_report(
    directory: Path, scores: LayerScores, plan: PruningPlan, results: Mapping[str, Any]
) -> None:
    """Write report.html into the directory of a run."""
    sources = ReportSources(plan, scores, results, model_path=model_path(directory))
    (directory / REPORT).write_text(render_page(sources), encoding="utf-8")


def write_recovery(directory: Path) -> None:
    """Write report.html into the directory of a recovered model, from the files there."""
    (directory / REPORT).write_text(report_page(directory), encoding="utf-8")


def bench_page(content: Mapping[str, Any]) -> str:
    """The page of a benchmark's results."""
    return render_page(ReportSources(bench=content))


def write_comparison(directory: Path, comparison: Comparison) -> None:
    """Write compare.html into the directory of a comparison."""
    page = render_page(ReportSources(comparison=comparison))
    (directory / "compare.html").write_text(page, encoding="utf-8")


def report_page(
    source: str | Path,
    *,
    evaluation: str | Path | None = None,
    bench: str | Path | None = None,
    recovery: str | Path | None = None,
    comparison: str | Path | None = None,
) -> str:
    """The page of `simdiff report` as HTML.

    Args:
        source: directory that `run`, `prune`, `recover` or `compare` wrote, or the file of an
            evaluation or a benchmark.
        evaluation, bench: files of an evaluation and of a benchmark; None takes those in the
            directory, if there are any.
        recovery: directory of a recovered model, or its recovery.json.
        comparison: directory of a comparison.

    Raises:
        SimdiffError: a file is missing or damaged, or of another model or cut.
    """
    given = {
        "evaluation": evaluation,
        "bench": bench,
        "recovery": recovery,
        "comparison": comparison,
    }
    paths = {name: None if path is None else Path(path) for name, path in given.items()}
    return render_page(read_sources(Path(source), **paths))


def render_page(sources: ReportSources) -> str:
    """Render the report as HTML, with a section for each source that exists."""
    plan = sources.plan
    name, title = map(html.escape, _titles(sources))
    about_plan = (
        []
        if plan is None
        else [
            *_headline(sources, plan),
            *cut_section(plan),
            *confidence_section(plan, sources.results),
            *_metrics(sources.scores, plan),
            *map_section(sources.scores, plan),
            *layers_section(plan, sources.scores),
        ]
    )
    sections = [
        f"<h1>{title}</h1>",
        *about_plan,
        *quality_section(sources),
        *speed_section(sources),
        *recovery_section(sources.recovery, 0 if plan is None else plan.num_layers),
        *_comparison(sources.comparison),
        *_generation(sources.results),
        *_provenance(sources),
    ]
    return document(name, sections)


def _comparison(comparison: Comparison | None) -> Iterator[str]:
    if comparison is not None:
        from simdiff.report.sections.comparison import comparison_sections  # loads torch

        yield from comparison_sections(comparison)


def _titles(sources: ReportSources) -> tuple[str, str]:
    """The name of the page, and its first heading."""
    if (plan := sources.plan) is not None:
        name = str(plan.model.get("name", "model"))
        return name, f"{name}: {len(plan.removed)} of {plan.num_layers} layers removed"
    if (found := sources.comparison) is not None:
        name = str(found.scores.model["name"])
        return f"{name}, compared", f"{name}: {len(found.criteria)} criteria compared"
    if sources.bench is not None:
        dense, pruned = (sources.bench["models"][key]["name"] for key in ("dense", "pruned"))
        return f"speed of {pruned}", f"Speed of {pruned} against {dense}"
    models = (sources.evaluation or {})["models"]
    return f"quality of {next(iter(models))}", f"Quality of {', '.join(models)}"


def _headline(sources: ReportSources, plan: PruningPlan) -> Iterator[str]:
    noun = "layer" if len(plan.removed) == 1 else "layers"
    removed = ", ".join(map(str, sorted(plan.removed)))
    yield (
        f"<p class='lead'>Decoder {noun} {removed} (counted from 0) of "
        f"{html.escape(str(plan.model.get('architecture', 'the model')))} were taken out; "
        f"{_others(sources.recovery)}</p>"
    )
    tiles = "".join(_tiles(sources, plan))
    if tiles:
        yield f"<div class='tiles'>{tiles}</div>"
    if sources.model_path is not None:
        code = (
            f"from transformers import {plan.loader}, AutoTokenizer\n"
            f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(sources.model_path)})\n"
            f"model = {plan.loader}.from_pretrained({json.dumps(sources.model_path)})"
        )
        yield "<p>The smaller model, seen from the directory of this page:</p>"
        yield f"<pre tabindex='0'>{html.escape(code)}</pre>"


def _others(recovery: Mapping[str, Any] | None) -> str:
    """What became of the layers that stay."""
    if recovery is None:
        return "the others are as they were, in an ordinary checkpoint."
    if recovery.get("changed", True):
        return "the others were repaired, which the section on recovery tells."
    return (
        "the others are as they were, since no repair of them helped, which the section on "
        "recovery tells."
    )


def _tiles(sources: ReportSources, plan: PruningPlan) -> Iterable[str]:
    results = sources.results
    if results is not None:
        before, after = results["dense"], results["pruned"]
        interval = stored_interval(after)
        yield tile(
            "held-out perplexity",
            f"{before['perplexity']:.2f} → {after['perplexity']:.2f}",
            f"{after['perplexity'] / before['perplexity']:.2f} times"
            + (
                ""
                if interval is None
                else f"; 95% interval of the pruned {interval_text(interval)}"
            ),
        )
    if sources.recovery is not None:
        found = sources.recovery["quality"]
        yield tile(
            "after recovery",
            f"{found['pruned']['perplexity']:.2f} → {found['recovered']['perplexity']:.2f}",
            f"held-out perplexity, {html.escape(str(sources.recovery['method']))}",
        )
    whole, small = plan.model.get("num_parameters"), pruned_parameters(plan)
    if whole and small:
        yield tile(
            "parameters", parameters_text(whole, small), f"{100 * (1 - small / whole):.1f}% fewer"
        )
    busy = busy_note(measured_by(sources.bench, sources.results)) is not None
    for phase, pairs in speed_pairs(sources).items():
        pair = pairs[0]
        share = "" if pair.share is None else f", {100 * pair.share:.0f}% of the ideal"
        share += ", on a busy machine" if busy else ""
        yield tile(
            f"{phase}, tokens per second",
            f"{speed_text(pair.dense)} → {speed_text(pair.pruned)}",
            f"{pair.ratio:.2f} times{share}",
        )


def _metrics(scores: LayerScores | None, plan: PruningPlan) -> Iterator[str]:
    if scores is None:
        return
    yield "<h2>Metrics over depth</h2>"
    yield (
        "<p class='lead'>What each layer does to the hidden state x that enters it, y being the "
        f"one that leaves, over {scores.num_tokens:,} tokens of calibration text.</p>"
    )
    pictures = "".join(
        figure(chart, "", title=title) for title, chart in metric_charts(scores, plan).items()
    )
    yield f"<div class='pair'>{pictures}</div>"
    errors = any(
        error is not None for table in scores.metrics.values() for error in table.standard_error
    )
    yield (
        "<p class='caption'>Dots and crosses: means over tokens; crosses on a band are the removed "
        "layers. Dashes: the largest token."
        + (" Thin lines: ± one standard error, mostly within the mark." if errors else "")
        + " Axes are logarithmic where values span more than a factor of 20. Every number is in "
        "the table of layers below.</p>"
    )


def _generation(results: Mapping[str, Any] | None) -> Iterator[str]:
    if results is None or "generation" not in results["pruned"]:
        return
    sample = results["pruned"]["generation"]
    check = "agrees" if sample["equals_uncached"] else "DISAGREES"
    yield "<h2>What the pruned model writes</h2>"
    yield (
        f"<blockquote><b>{html.escape(sample['prompt'])}</b>{html.escape(sample['text'])}"
        f"</blockquote><p class='caption'>Greedy, with the KV cache, without recovery; every token "
        f"{check} with a forward without cache.</p>"
    )


def _provenance(sources: ReportSources) -> Iterator[str]:
    yield "<h2>Where this comes from</h2>"
    if sources.plan is not None:
        yield "<p>These commands repeat the cut:</p>"
        yield f"<pre tabindex='0'>{html.escape(chr(10).join(reproduction(sources.plan)))}</pre>"
    yield facts_table(_facts(sources))


def _facts(sources: ReportSources) -> dict[str, Any]:
    plan, scores, results = sources.plan, sources.scores, sources.results
    facts: dict[str, Any] = {}
    if plan is not None:
        facts = {
            **model_facts(plan.model),
            **{f"calibration {key}": value for key, value in plan.calibration.items()},
        }
    if sources.comparison is not None:
        from simdiff.report.sections.comparison import comparison_facts

        prefix = "" if plan is None else "comparison, "
        found = comparison_facts(sources.comparison)
        facts |= {f"{prefix}{key}": value for key, value in found.items()}
    if scores is not None:
        known = scores.provenance
        facts["scored with"] = f"backend {known.get('backend')} on {known.get('device')}"
        facts |= _versions("scores", known)
    if results is not None:
        facts |= {f"held-out {key}": value for key, value in results["evaluation"].items()}
        if speeds := results["dense"].get("speed"):
            facts["speed of the run"] = (
                f"{number_of(speeds['repeats'], 'interleaved repetition')}, medians, "
                f"{number_of(speeds['num_threads'], 'thread')}, {results['machine']}"
            )
        elif results.get("streamed"):
            facts["speed of the run"] = "not measured, since the model was streamed"
        facts |= _versions("run", results)
    for kind, content in (
        ("evaluation", sources.evaluation),
        ("benchmark", sources.bench),
        ("recovery", sources.recovery),
    ):
        if content is None:
            continue
        if "machine" in content:
            facts[f"{kind} on"] = content["machine"]
        facts |= _versions(kind, content)
    return facts


def _versions(kind: str, content: Mapping[str, Any]) -> dict[str, str]:
    versions = content.get("versions", {})
    told = ", ".join(f"{name} {value}" for name, value in versions.items())
    created = content.get("created")
    return {f"{kind} made": f"{created}, {told}"} if created and told else {}
