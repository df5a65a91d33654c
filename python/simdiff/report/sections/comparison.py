"""The sections of a comparison: plot, tables that sort and filter, layers, what criteria are."""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator
from typing import Any

from simdiff.comparison.results import ComparedCell, Comparison
from simdiff.errors import number_of
from simdiff.planning.block_costs import block_costs
from simdiff.planning.criteria import CRITERIA, criterion_named
from simdiff.planning.entry_points import foreign_criteria
from simdiff.planning.perplexity_search import FORMULAS
from simdiff.report.cells import cell_texts, model_facts
from simdiff.report.figures.blocks import heat_map
from simdiff.report.figures.layers import layers_chart
from simdiff.report.figures.perplexity import perplexity_chart
from simdiff.report.html import figure, sortable, tile
from simdiff.report.numbers import duration, perplexity_text

_SEARCH_SOURCES = {
    "one-shot-perplexity": "Shortened LLaMA, arXiv 2402.02834",
    "greedy-perplexity": "SLEB, arXiv 2402.09025",
}


def comparison_sections(comparison: Comparison) -> Iterator[str]:
    """Yield the HTML of the sections of a comparison."""
    counts = ", ".join(map(str, comparison.counts))
    yield "<h2>Criteria compared: perplexity over removed layers</h2>"
    yield (
        f"<p class='lead'>{counts} of {comparison.scores.num_layers} layers removed, without "
        "recovery; layers count from 0.</p>"
    )
    yield f"<div class='tiles'>{''.join(_tiles(comparison))}</div>"
    yield figure(
        perplexity_chart(comparison),
        "Lower is better; bands are 95% intervals. An arrow at the edge is a criterion that is far "
        "above the others. Every number is in the tables below.",
        kind="wide",
    )
    yield "<h2>Held-out perplexity and time to plan</h2>"
    yield _summary(comparison)
    yield (
        "<p class='caption'>Lowest of a column: marked *. Time to plan: for the largest cut, from "
        "the model in memory, its calibration pass and evaluations included.</p>"
    )
    yield "<h2>Which layers each criterion takes</h2>"
    yield from _layers(comparison)
    yield from _blocks(comparison)
    yield from _sweeps(comparison)
    yield "<h2>Every cell</h2>"
    yield _cells(comparison)
    yield "<h2>What the criteria are</h2>"
    yield _criteria(comparison)


def _layers(comparison: Comparison) -> Iterable[str]:
    pictures = "".join(
        figure(layers_chart(comparison, count), "", title=f"{number_of(count, 'layer')} removed")
        for count in comparison.counts
    )
    yield f"<div class='pair'>{pictures}</div>"
    yield "<p class='caption'>The same layers are in the table of every cell below.</p>"


def _blocks(comparison: Comparison) -> Iterable[str]:
    if comparison.scores.blocks is None:
        return
    pictures = []
    for criterion, title in (
        ("simdiff", "Cost by simdiff: turn and growth"),
        ("cosine-distance", "Cosine distance alone"),
    ):
        costs = block_costs(comparison.scores, criterion)
        picture = heat_map(costs)
        if picture is not None:
            caption = f"<code>{html.escape(costs.formula)}</code>, no unit"
            pictures.append(figure(picture, caption, title=title))
    if pictures:
        yield "<h2>Every block of layers</h2>"
        yield (
            "<p class='lead'>What it costs to cut all layers from the first to the last; bright is "
            "cheap, the scale is logarithmic.</p>"
        )
        yield f"<div class='pair'>{''.join(pictures)}</div>"


def _tiles(comparison: Comparison) -> Iterable[str]:
    dense = comparison.dense
    interval = "" if dense.low is None else f"{dense.low:.2f} to {dense.high:.2f}, "
    windows = comparison.provenance["held_out"]["num_windows"]
    yield tile(
        "dense perplexity", f"{dense.perplexity:.2f}", f"{interval}{number_of(windows, 'window')}"
    )
    for count in comparison.counts[-1:]:
        best = _best(comparison, count)
        if best is not None and best.quality is not None:
            yield tile(
                f"best at {number_of(count, 'layer')}",
                f"{best.quality.perplexity:.2f}",
                f"{best.cell.criterion}, {best.quality.ratio:.2f} times dense",
            )
    seconds = comparison.provenance["scoring_seconds"]
    yield tile("calibration pass", duration(seconds), "scores every layer and block")


def _best(comparison: Comparison, count: int) -> ComparedCell | None:
    measured = [
        entry
        for entry in (comparison.at(name, count) for name in comparison.criteria)
        if entry.quality is not None
    ]
    return min(
        measured,
        key=lambda entry: entry.quality.perplexity if entry.quality else 0.0,
        default=None,
    )


def _perplexity(entry: ComparedCell) -> float | None:
    return None if entry.quality is None else entry.quality.perplexity


def _summary(comparison: Comparison) -> str:
    counts = comparison.counts
    lowest = [None if (b := _best(comparison, n)) is None else _perplexity(b) for n in counts]
    rows: list[list[str]] = []
    keys: list[list[float | None]] = []
    for name in comparison.criteria:
        values = [_perplexity(comparison.at(name, count)) for count in counts]
        texts = [
            "none" if value is None else perplexity_text(value) + "*" * (value == least)
            for value, least in zip(values, lowest, strict=True)
        ]
        seconds = comparison.at(name, counts[-1]).cell.seconds
        rows.append([name, *texts, duration(seconds)])
        keys.append([None, *values, seconds])
    columns = ["criterion", *(number_of(count, "layer") for count in counts), "time to plan"]
    return sortable(columns, rows, keys)


def _cells(comparison: Comparison) -> str:
    columns = (
        "removed",
        "criterion",
        "perplexity",
        "interval",
        "× dense",
        "interval",
        "time to plan",
        "layers",
    )
    keys: list[list[float | None]] = []
    for entry in comparison.cells:
        quality = entry.quality
        value, low, ratio, ratio_low = (
            (None,) * 4
            if quality is None
            else (quality.perplexity, quality.low, quality.ratio, quality.ratio_low)
        )
        seconds = entry.cell.seconds
        keys.append([entry.cell.num_remove, None, value, low, ratio, ratio_low, seconds, None])
    rows = [cell_texts(entry) for entry in comparison.cells]
    return sortable(columns, rows, keys, text=(1, 7), find=(0, 1))


def _sweeps(comparison: Comparison) -> Iterable[str]:
    swept = [entry for entry in comparison.cells if entry.cell.sweep is not None]
    if not swept:
        return
    yield "<h2>Perplexity over α, exactly</h2>"
    yield (
        "<p class='lead'>The plan changes only where the importances of two layers cross: between "
        "these α the perplexity is constant. Measured on calibration text.</p>"
    )
    for entry in swept:
        sweep = entry.cell.sweep or {}
        rows = "".join(
            f"<tr><td class='text'>{piece['alpha']}</td><td>"
            f"{'none' if piece['perplexity'] is None else perplexity_text(piece['perplexity'])}"
            f"</td><td class='text'>{', '.join(map(str, piece['removed']))}</td></tr>"
            for piece in sweep["curve"]
        )
        yield (
            f"<details><summary>{entry.cell.criterion}, "
            f"{number_of(entry.cell.num_remove, 'layer')}: "
            f"{number_of(sweep['num_sets'], 'plan')}, best for α in {sweep['best']}</summary>"
            "<div class='scroll'><table><tr><th class='text'>α</th><th>perplexity</th>"
            f"<th class='text'>layers</th></tr>{rows}</table></div></details>"
        )


def _criteria(comparison: Comparison) -> str:
    rows = []
    for name in comparison.criteria:
        plain = name.removesuffix("-swept")
        if plain in CRITERIA or plain in foreign_criteria():
            formula, source = criterion_named(plain).formula, criterion_named(plain).source
            if name != plain:
                source += "; alpha swept exactly by perplexity on calibration text"
        else:
            formula, source = FORMULAS[name], _SEARCH_SOURCES[name]
        rows.append(
            f"<tr><td class='text'>{name}</td>"
            f"<td class='text wrap'><code>{html.escape(formula)}</code></td>"
            f"<td class='text wrap'>{html.escape(source)}</td></tr>"
        )
    head = (
        "<th class='text'>criterion</th><th class='text'>formula</th><th class='text'>source</th>"
    )
    return f"<div class='scroll'><table><tr>{head}</tr>{''.join(rows)}</table></div>"


def comparison_facts(comparison: Comparison) -> dict[str, Any]:
    """What the comparison is of: its model, texts, options, machine and versions."""
    known = comparison.provenance
    return {
        **model_facts(known["model"]),
        **{f"calibration {key}": value for key, value in known["calibration"].items()},
        **{f"held-out {key}": value for key, value in known["held_out"].items()},
        "search windows": known["search_windows"],
        **{
            key: value
            for key, value in known["options"].items()
            if key not in ("criteria", "num_layers")
        },
        "intervals": f"{100 * known['intervals']['confidence']:.0f}% by "
        f"{known['intervals']['of']}, {known['held_out']['num_windows']} of them; ratios paired",
        "times": f"{number_of(known['num_threads'], 'thread')}, {known['machine']}",
        **{f"version of {key}": value for key, value in comparison.to_dict()["versions"].items()},
    }
