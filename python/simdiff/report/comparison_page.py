"""The page of a comparison: one self-contained HTML file."""

from __future__ import annotations

import html
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from simdiff.comparison.results import ComparedCell, Comparison
from simdiff.planning.block_costs import block_costs
from simdiff.planning.criteria import CRITERIA, criterion_named
from simdiff.planning.entry_points import foreign_criteria
from simdiff.planning.perplexity_search import FORMULAS
from simdiff.report.cells import cell_texts, duration, perplexity_text
from simdiff.report.figures.blocks import heat_map
from simdiff.report.figures.layers import layers_chart
from simdiff.report.figures.perplexity import perplexity_chart
from simdiff.report.html import document, facts_table, figure, tile

_SEARCH_SOURCES = {
    "one-shot-perplexity": "Shortened LLaMA, arXiv 2402.02834",
    "greedy-perplexity": "SLEB, arXiv 2402.09025",
}


def write_comparison(directory: Path, comparison: Comparison) -> None:
    """Write compare.html into a directory."""
    page = render_comparison(comparison)
    (directory / "compare.html").write_text(page, encoding="utf-8")


def render_comparison(comparison: Comparison) -> str:
    """Render the page of a comparison as HTML."""
    name = html.escape(str(comparison.scores.model["name"]))
    counts = ", ".join(map(str, comparison.counts))
    sections = [
        f"<h1>{name}: {len(comparison.criteria)} criteria compared</h1>",
        f"<p class='lead'>{counts} of {comparison.scores.num_layers} layers removed, without "
        "recovery; layers count from 0.</p>",
        f"<div class='tiles'>{''.join(_tiles(comparison))}</div>",
        "<h2>Perplexity over removed layers</h2>",
        figure(
            perplexity_chart(comparison),
            "Lower is better; bands are 95% intervals. Every number is in the tables below.",
            kind="wide",
        ),
        "<h2>Held-out perplexity and time to plan</h2>",
        _summary(comparison),
        "<p class='caption'>Bold: the lowest of the column. Time to plan: for the largest cut, "
        "from the model in memory, its calibration pass and evaluations included.</p>",
        "<h2>Which layers each criterion takes</h2>",
        *_layers(comparison),
        *_blocks(comparison),
        *_sweeps(comparison),
        "<h2>Every cell</h2>",
        _cells(comparison),
        "<h2>What the criteria are</h2>",
        _criteria(comparison),
        "<h2>Where this comes from</h2>",
        facts_table(_facts(comparison)),
    ]
    return document(f"{name}, compared", sections)


def _layers(comparison: Comparison) -> Iterable[str]:
    pictures = "".join(
        figure(layers_chart(comparison, count), "", title=f"{count} layers removed")
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
    yield tile("dense perplexity", f"{dense.perplexity:.2f}", f"{interval}{windows} windows")
    for count in comparison.counts[-1:]:
        best = _best(comparison, count)
        if best is not None and best.quality is not None:
            yield tile(
                f"best at {count} layers",
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


def _summary(comparison: Comparison) -> str:
    counts = comparison.counts
    best = {count: _best(comparison, count) for count in counts}
    head = "<th class='text'>criterion</th>" + "".join(f"<th>{count}</th>" for count in counts)
    rows = []
    for name in comparison.criteria:
        cells = []
        for count in counts:
            entry = comparison.at(name, count)
            text = "none" if entry.quality is None else perplexity_text(entry.quality.perplexity)
            winner = best[count]
            wins = (
                entry.quality is not None
                and winner is not None
                and winner.quality is not None
                and entry.quality.perplexity == winner.quality.perplexity
            )
            cells.append(f"<td>{f'<b>{text}</b>' if wins else text}</td>")
        seconds = html.escape(duration(comparison.at(name, counts[-1]).cell.seconds))
        rows.append(f"<tr><td class='text'>{name}</td>{''.join(cells)}<td>{seconds}</td></tr>")
    table = f"<table><tr>{head}<th>time to plan</th></tr>{''.join(rows)}</table>"
    return f"<div class='scroll'>{table}</div>"


def _cells(comparison: Comparison) -> str:
    head = (
        "<th>removed</th><th class='text'>criterion</th><th>perplexity</th><th>interval</th>"
        "<th>× dense</th><th>interval</th><th>time to plan</th><th class='text'>layers</th>"
    )
    rows = []
    for entry in comparison.cells:
        cells = cell_texts(entry)
        columns = "".join(f"<td>{html.escape(text)}</td>" for text in cells[2:-1])
        rows.append(
            f"<tr><td>{cells[0]}</td><td class='text'>{cells[1]}</td>{columns}"
            f"<td class='text'>{html.escape(cells[-1])}</td></tr>"
        )
    return f"<div class='scroll'><table><tr>{head}</tr>{''.join(rows)}</table></div>"


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
            f"<details><summary>{entry.cell.criterion}, {entry.cell.num_remove} layers: "
            f"{sweep['num_sets']} plans, best for α in {sweep['best']}</summary>"
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


def _facts(comparison: Comparison) -> dict[str, Any]:
    known = comparison.provenance
    return {
        **{
            f"model {key}": value
            for key, value in known["model"].items()
            if not isinstance(value, list)
        },
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
        "times": f"{known['num_threads']} threads, {known['machine']}",
        **{f"version of {key}": value for key, value in comparison.to_dict()["versions"].items()},
    }
