"""The section on speed: tokens per second and the ideal."""

from __future__ import annotations

import html
from collections.abc import Iterator

from simdiff.errors import number_of
from simdiff.report.figures.speed import SpeedPair, speed_chart
from simdiff.report.html import facts_table, figure, notes_list, table
from simdiff.report.numbers import speed_text
from simdiff.report.sources import Content, ReportSources
from simdiff.report.speed_notes import (
    busy_note,
    draft_caption,
    draft_rows,
    measured_by,
    measured_notes,
)

PHASES = {"prefill": "flops", "decode": "bytes"}


def speed_pairs(sources: ReportSources) -> dict[str, list[SpeedPair]]:
    """The speeds measured in each phase, by the benchmark or else by the run."""
    if sources.bench is not None:
        settings = sources.bench["settings"]
        return {phase: [_benched(setting, phase) for setting in settings] for phase in PHASES}
    if sources.results is not None and "speed" in sources.results["dense"]:
        results = sources.results
        return {phase: [_run_pair(results, phase)] for phase in PHASES}
    return {}


def _benched(setting: Content, phase: str) -> SpeedPair:
    dense, pruned = (setting[name]["tokens_per_second"][phase] for name in ("dense", "pruned"))
    found = setting["phases"][phase]
    return SpeedPair(
        f"batch {setting['batch_size']}, prompt {setting['prompt_length']}"
        + (f", {setting['new_tokens']} new tokens" if phase == "decode" else ""),
        dense["median"],
        pruned["median"],
        found["ratio"]["median"],
        found["ideal"],
        found["share_of_ideal"],
        (dense["lower_quartile"], dense["upper_quartile"]),
        (pruned["lower_quartile"], pruned["upper_quartile"]),
        (found["ratio"]["low"], found["ratio"]["high"])
        if found["ratio"].get("coverage", 1)
        else None,
    )


def _run_pair(results: Content, phase: str) -> SpeedPair:
    dense, pruned = results["dense"]["speed"], results["pruned"]["speed"]
    ideal, share, ratio = (
        (pruned.get(key) or {}).get(phase) for key in ("ideal", "share_of_ideal", "times_faster")
    )
    return SpeedPair(
        f"batch 1, prompt {dense['prompt_tokens']}"
        + (f", {dense['new_tokens']} new tokens" if phase == "decode" else ""),
        dense[phase],
        pruned[phase],
        ratio or pruned[phase] / dense[phase],
        ideal,
        share,
    )


def speed_section(sources: ReportSources) -> Iterator[str]:
    """Yield the HTML of the section on speed; nothing if nothing was measured."""
    phases = speed_pairs(sources)
    if not phases:
        return
    has_ideal = any(pair.ideal is not None for pairs in phases.values() for pair in pairs)
    yield f"<h2>Speed{' against the ideal' if has_ideal else ''}</h2>"
    busy = busy_note(measured_by(sources.bench, sources.results))
    if busy is not None:
        yield f"<p class='note'>{busy}</p>"
    pictures = "".join(
        figure(
            speed_chart(phase.capitalize(), by if has_ideal else "", phases[phase]),
            "",
            title=phase.capitalize(),
        )
        for phase, by in PHASES.items()
    )
    yield f"<div class='pair'>{pictures}</div>"
    yield _table(phases)
    yield f"<p class='caption'>{_caption(sources, has_ideal)}</p>"
    if sources.bench is not None:
        yield notes_list(measured_notes(sources.bench))
        if rows := draft_rows(sources.bench):
            yield "<h3>As a draft of its own parent</h3>"
            yield facts_table(dict(rows))
            yield f"<p class='caption'>{html.escape(draft_caption(sources.bench))}</p>"


def _table(phases: dict[str, list[SpeedPair]]) -> str:
    rows = [
        (
            phase,
            pair.label,
            speed_text(pair.dense),
            speed_text(pair.pruned),
            f"{pair.ratio:.3f}",
            ""
            if pair.ratio_interval is None
            else f"{pair.ratio_interval[0]:.3f} to {pair.ratio_interval[1]:.3f}",
            "" if pair.ideal is None else f"{pair.ideal:.3f}",
            "" if pair.share is None else f"{100 * pair.share:.1f}%",
        )
        for phase, pairs in phases.items()
        for pair in pairs
    ]
    columns = (
        "phase",
        "setting",
        "dense",
        "pruned",
        "times faster",
        "interval",
        "ideal",
        "of the ideal",
    )
    # Columns without any entry are left out.
    used = [c for c in range(len(columns)) if any(row[c] for row in rows)]
    return table([columns[c] for c in used], [[row[c] for c in used] for row in rows], text=(0, 1))


def _caption(sources: ReportSources, has_ideal: bool) -> str:
    first = (
        "Dense and pruned in tokens per second; times faster is the median of the ratios within "
        "each round. "
    )
    ideal = first + (
        "The ideal counts what must be done at least: in decoding the bytes of weights and KV "
        "cache that are read, in prefill the floating-point operations, dense over pruned. "
        if has_ideal
        else ""
    )
    if sources.bench is not None:
        content = sources.bench
        repeats = sorted({setting["repeats"] for setting in content["settings"]})
        return (
            f"{ideal}Medians of {' or '.join(map(str, repeats))} "
            f"{'round' if repeats == [1] else 'rounds'}, both models by turns in "
            f"one process; thin lines are quartiles. {content['dtype']}, {content['device']}, "
            f"{number_of(content['num_threads'], 'thread')}, {content['machine']}."
        )
    results = sources.results or {}
    speeds = results["dense"]["speed"]
    how = [speeds[key] for key in ("decoding", "device") if key in speeds]
    known = ", ".join([*how, number_of(speeds["num_threads"], "thread"), results["machine"]])
    return (
        f"{ideal}Medians of {number_of(speeds['repeats'], 'repetition')}, both models by turns in "
        f"one process: "
        f"{html.escape(known)}."
    )
