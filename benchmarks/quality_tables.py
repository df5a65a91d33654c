"""Tables of what quality.py measured: every way beside `simdiff + reads`, window by window.

A ratio is of perplexities on the same held-out windows, way by `simdiff + reads`: exp of the mean,
over windows and seeds, of the differences of losses. Its 95% interval is Student's t: with n_i
windows and the variance s_i² of the differences in each of k seeds, the standard error is
sqrt(sum of s_i² / n_i) / k, with the sum of n_i - 1 degrees of freedom.

A file NAME-all.json holds more ways of some seeds of NAME.json.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpu_page
import ratios
from models import LICENCES

from simdiff.evaluation.intervals import student_quantile

OURS = "simdiff + reads"
ABLATIONS = (f"{OURS}, no exchanges", f"{OURS}, p = 1", "simdiff, p = 1")
RIVALS = (
    "block-influence",
    "block-influence + reads",
    *(f"greedy perplexity, {n} windows" for n in (1, 4, 16)),
)
SHARES = ("10%", "25%")
NOT_RUN = "-"
Losses = Sequence[float]


@dataclass(frozen=True)
class Seed:
    """One division of a text: rows by way and number of layers, losses by plan."""

    number: int
    rows: dict[tuple[str, int], dict[str, Any]]
    losses: dict[str, list[float] | None]

    def of(self, way: str, removed: int) -> Losses | None:
        """The held-out losses of a way; None where it has none."""
        row = self.rows.get((way, removed))
        return self.losses.get(row["layers"]) if row and row["layers"] else None

    def plan(self, way: str, removed: int) -> str | None:
        row = self.rows.get((way, removed))
        return row and row["layers"]


@dataclass(frozen=True)
class Subject:
    """A model on a text, of all files that measured it."""

    files: list[Path]
    content: dict[str, Any]
    seeds: list[Seed]

    @property
    def model(self) -> str:
        return str(self.content["model"]["name"])

    @property
    def text(self) -> str:
        return str(self.content["settings"]["text"])

    @property
    def counts(self) -> list[int]:
        """Numbers of layers removed."""
        return sorted({removed for seed in self.seeds for _, removed in seed.rows})

    def ways(self, removed: int) -> list[str]:
        found = {way for seed in self.seeds for way, count in seed.rows if count == removed}
        return sorted(found, key=lambda way: (way != OURS, way))


@dataclass(frozen=True)
class Ratio:
    """Of perplexities, with the ends of its interval."""

    value: float
    low: float
    high: float

    @property
    def distinguishable(self) -> bool:
        return not self.low <= 1 <= self.high


def pooled_ratio(differences: Sequence[Losses]) -> Ratio:
    """From the differences of losses, one sequence of two or more windows for each seed."""
    mean = statistics.fmean(statistics.fmean(gaps) for gaps in differences)
    variance = math.fsum(statistics.variance(gaps) / len(gaps) for gaps in differences)
    quantile = student_quantile(sum(len(gaps) - 1 for gaps in differences))
    reach = quantile * math.sqrt(variance) / len(differences)
    return Ratio(_exp(mean), _exp(mean - reach), _exp(mean + reach))


def load(folder: Path, prefix: str) -> list[Subject]:
    """The models and texts of all files PREFIX-*.json, those of one seed joined.

    Raises:
        ValueError: two files of one name are not of the same model, documents and windows.
    """
    named: dict[str, list[Path]] = {}
    for path in sorted(folder.glob(f"{prefix}-*.json"), key=lambda path: path.stem):
        named.setdefault(path.stem.removesuffix("-all").removesuffix("-greedy"), []).append(path)
    return [_joined(paths) for paths in named.values()]


def _joined(paths: list[Path]) -> Subject:
    contents = [json.loads(path.read_text()) for path in paths]
    seeds: dict[int, list[dict[str, Any]]] = {}
    for content in contents:
        for seed in content["seeds"]:
            seeds.setdefault(seed["seed"], []).append(seed)
    same = {
        json.dumps(
            [
                content["model"],
                *(
                    content["settings"][key]
                    for key in (
                        "text",
                        "pool",
                        "windows",
                        "window_length",
                        "held_out_windows",
                        "held_out_length",
                        "dtype",
                    )
                ),
            ]
        )
        for content in contents
    }
    for number, parts in seeds.items():
        same_documents = {part["documents_sha256"] for part in parts}
        if len(same) > 1 or len(same_documents) > 1:
            names = ", ".join(path.name for path in paths)
            raise ValueError(
                f"{names}: must be of one model, text and windows, seed {number} is not"
            )
    return Subject(paths, contents[0], [_seed(number, parts) for number, parts in seeds.items()])


def _seed(number: int, parts: Sequence[dict[str, Any]]) -> Seed:
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    losses: dict[str, list[float] | None] = {}
    for part in parts:  # the first file that has a way stands
        rows = {(row["way"], row["removed"]): row for row in part["rows"]} | rows
        losses = part["held_out_losses"] | losses
    return Seed(number, rows, losses)


def ratio(subject: Subject, way: str, removed: int, base: str = OURS) -> Ratio | None:
    """To another way, over the seeds that measured both; None where none did."""
    pairs = [(seed.of(way, removed), seed.of(base, removed)) for seed in subject.seeds]
    gaps = [
        [a - b for a, b in zip(theirs, ours, strict=True)]
        for theirs, ours in pairs
        if theirs and ours
    ]
    return pooled_ratio(gaps) if gaps else None


def ratio_cell(subject: Subject, way: str, removed: int, base: str = OURS) -> str:
    """The ratio in words, with its seeds where these are not all."""
    found = ratio(subject, way, removed, base)
    if way == base or found is None:
        return "1" if way == base else NOT_RUN
    both = [seed for seed in subject.seeds if seed.of(way, removed) and seed.of(base, removed)]
    if all(seed.plan(way, removed) == seed.plan(base, removed) for seed in both):
        text = "same plan"
    else:
        text = ratios.shown(found.value, {"low": found.low, "high": found.high})
        text += "" if found.distinguishable else ", not distinguishable"
    return text if len(both) == len(subject.seeds) else f"{text} (seed {_listed(both)})"


def way_table(subject: Subject, removed: int) -> list[str]:
    """All ways but ablations, best ratio first, those that were refused last."""
    ways = [way for way in subject.ways(removed) if way not in ABLATIONS]

    def order(way: str) -> float:
        found = ratio(subject, way, removed)
        return math.inf if found is None else found.value

    numbers = " / ".join(str(seed.number) for seed in subject.seeds)
    heads = ("way", "perplexity", f"with seed {numbers}", f"× {OURS}", "windows read", "seconds")
    dense = [seed.losses["dense"] for seed in subject.seeds]
    rows = [("dense", *_perplexities(dense, [""] * len(dense)), "", "", "")]
    for way in sorted(ways, key=order):
        found = [seed.rows.get((way, removed)) for seed in subject.seeds]
        problems = [str(row["problem"] or "") if row else NOT_RUN for row in found]
        run = [row for row in found if row]
        rows.append(
            (
                told(way),
                *_perplexities([seed.of(way, removed) for seed in subject.seeds], problems),
                ratio_cell(subject, way, removed),
                _range([row["windows_read"] for row in run]),
                f"{statistics.fmean(row['seconds'] for row in run):.0f}",
            )
        )
    return gpu_page.table(heads, rows)


def _perplexities(losses: Sequence[Losses | None], problems: Sequence[str]) -> tuple[str, str]:
    """The geometric mean over seeds, where all were run, and each seed's own."""
    means = [statistics.fmean(values) if values else None for values in losses]
    known = [mean for mean in means if mean is not None]
    cells = (
        _shown(mean) if mean is not None else problem or NOT_RUN
        for mean, problem in zip(means, problems, strict=True)
    )
    every = _shown(statistics.fmean(known)) if len(known) == len(means) else NOT_RUN
    return every, " / ".join(cells)


def summary(subjects: Iterable[Subject]) -> list[str]:
    """For each model, text and share: the rivals' ratios; of greedy search those that were run."""
    subjects = list(subjects)
    run = {way for subject in subjects for count in subject.counts for way in subject.ways(count)}
    rivals = [way for way in RIVALS if way in run]
    rows = []
    for subject in subjects:
        for share, count in zip(SHARES, subject.counts, strict=False):
            rows.append(
                (
                    subject.model,
                    subject.text,
                    _listed(subject.seeds),
                    f"{count} ({share})",
                    *(ratio_cell(subject, way, count) for way in rivals),
                )
            )
    return gpu_page.table(("model", "text", "seeds", "layers removed", *map(told, rivals)), rows)


def ablations(subjects: Sequence[Subject], wanted: Callable[[str], bool]) -> list[str]:
    """How often a way without a part gives the same plan, a better one or a worse one.

    A way that reads is compared with `simdiff + reads`, one that does not with `simdiff`.
    """
    cases = [(subject, count) for subject in subjects for count in subject.counts]
    ways = {way: None for subject, count in cases for way in subject.ways(count) if wanted(way)}
    rows = []
    for way in sorted(ways):
        base = way.partition(",")[0]
        found = [
            (ratio_cell(subject, way, count, base), ratio(subject, way, count, base))
            for subject, count in cases
            if way in subject.ways(count)
        ]
        others = [value for cell, value in found if value and not cell.startswith("same plan")]
        values = [value.value for value in others]
        rows.append(
            (
                way,
                len(found),
                sum(cell.startswith("same plan") for cell, _ in found),
                sum(value.high < 1 for value in others),
                sum(value.low > 1 for value in others),
                sum(not value.distinguishable for value in others),
                f"{min(values):.2f} to {max(values):.2f}" if values else "",
            )
        )
    heads = (
        "way",
        "cases",
        "same plan",
        "better",
        "worse",
        "not distinguishable",
        "ratios of other plans",
    )
    return gpu_page.table(heads, rows)


def better_ways(subjects: Iterable[Subject], base: str = OURS) -> list[str]:
    """In words, every way that chose better with 95% confidence, ablations apart."""
    return [
        f"{told(way)} on {subject.model}, {subject.text}, {count} layers "
        f"({ratio_cell(subject, way, count, base)})"
        for subject in subjects
        for count in subject.counts
        for way in subject.ways(count)
        if way not in ABLATIONS and (found := ratio(subject, way, count, base)) and found.high < 1
    ]


def costs(subjects: Iterable[Subject], way: str) -> dict[str, tuple[str, str]] | None:
    """Windows read and seconds, ours and those of a way where it was run, as ranges."""
    pairs = [
        (seed.rows[OURS, count], seed.rows[way, count])
        for subject in subjects
        for seed in subject.seeds
        for count in subject.counts
        if (way, count) in seed.rows and (OURS, count) in seed.rows
    ]
    return (
        {
            key: (_range([a[key] for a, _ in pairs]), _range([b[key] for _, b in pairs]))
            for key in ("windows_read", "seconds")
        }
        if pairs
        else None
    )


def protocol(subjects: Sequence[Subject]) -> str:
    """Once, what holds of all tables."""
    settings = [subject.content["settings"] for subject in subjects]

    def one(key: str) -> str:
        return " or ".join(sorted({str(values[key]) for values in settings}))

    def of_files(key: str) -> str:
        return " and ".join(sorted({str(subject.content[key]) for subject in subjects}))

    numbers = sorted({seed.number for subject in subjects for seed in subject.seeds})
    licences = {
        subject.text: seed["licence"] for subject in subjects for seed in subject.content["seeds"]
    }
    return (
        f"{'Seeds' if len(numbers) > 1 else 'Seed'} {', '.join(map(str, numbers))}, each another "
        "division of the documents; "
        f"{one('windows')} windows of {one('window_length')} tokens calibrate, "
        f"{one('held_out_windows')} of {one('held_out_length')} are held out, pool "
        f"“{one('pool')}”; {one('dtype')}; {of_files('machine')}, threads of "
        f"each run: {of_files('threads')}; commit {of_files('commit')}. Texts: "
        + "; ".join(f"{text}: {licence}" for text, licence in sorted(licences.items()))
        + "."
    )


def models(subjects: Iterable[Subject]) -> list[str]:
    """A line for each model: its licence and the GGUF file that its weights were made of."""
    lines = {}
    for subject in subjects:
        source = subject.content["model"]["converted_from"]
        told = "its own safetensors"
        if source:
            packages = f" ({source['packages']})" if "packages" in source else ""
            told = f"converted from a 4-bit GGUF file, {source['file']}{packages}, "
            told += f"SHA-256 {source['sha256'][:12]}…"
        licence = LICENCES.get(subject.model, "licence not known")
        lines[f"- {subject.model} ({licence}): {told}"] = None
    return list(lines)


def less_often(subjects: Sequence[Subject]) -> list[str]:
    """A table of the ways that were not run on every model and text with every seed."""
    every = sorted(
        {way for subject in subjects for count in subject.counts for way in subject.ways(count)}
    )
    numbers = {seed.number for subject in subjects for seed in subject.seeds}
    rows = []
    for way in every:
        runs = [
            [seed for seed in subject.seeds if any(name == way for name, _ in seed.rows)]
            for subject in subjects
        ]
        if any(len(run) < len(numbers) for run in runs):
            cells = [
                "all" if len(run) == len(numbers) else _listed(run) if run else "-" for run in runs
            ]
            rows.append(f"| {' | '.join([told(way), *cells])} |")
    if not rows:
        return ["Every way was run with every seed."]
    heads = [f"{subject.model}, {subject.text}" for subject in subjects]
    return [
        "Seeds with which ways were run; those that are not named, with all:",
        "",
        f"| way | {' | '.join(heads)} |",
        "|---" * (1 + len(heads)) + "|",
        *rows,
    ]


def told(way: str) -> str:
    """The name of a way on a page."""
    return way.removesuffix("s") if way.endswith(" 1 windows") else way


def _listed(seeds: Iterable[Seed]) -> str:
    return ", ".join(str(seed.number) for seed in seeds)


def _shown(loss: float) -> str:
    perplexity = _exp(loss)
    return f"{perplexity:.1f}" if perplexity < 1000 else f"{perplexity:.0f}"


def _range(values: Sequence[float]) -> str:
    low, high = (f"{value:.0f}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))
