"""What effort.py measured, beside the ways of quality.py on the same windows.

Ratios are those of quality_tables.py, to effort `normal`. A file effort-NAME.json belongs to the
results of the quality protocol of the same model, text and pool: their losses of the dense model on
the held-out windows are the same.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

import gpu_page
import quality_tables
from quality_tables import Seed, Subject, ratio, ratio_cell, told

BASE = "effort normal"
EFFORTS = ("effort none", "effort quick", "effort thorough")
# The best single block stands for what `none` is held to, beside block influence.
RIVALS = (*quality_tables.RIVALS, "cosine-block")
# Losses of the dense model on other windows differ by some tenths; machines differ by rounding.
SAME = 0.01


def load(folder: Path, quality: Iterable[Subject]) -> list[Subject]:
    """The models and texts that effort.py measured, each with the ways of quality.py.

    Raises:
        ValueError: a file is of windows or of a model that the quality protocol did not measure.
    """
    known = {(subject.model, subject.text): subject for subject in quality}
    files: dict[tuple[str, str], list[Path]] = {}
    for path in sorted(folder.glob("effort-*.json")):
        content = json.loads(path.read_text())
        files.setdefault((content["model"]["name"], content["settings"]["text"]), []).append(path)
    found = []
    for key, paths in files.items():
        if key not in known:
            raise ValueError(f"{paths[0].name}: must be of a model and text of quality-*.json")
        seeds = {seed.number: seed for seed in known[key].seeds}
        measured: dict[int, Seed] = {}
        for path in paths:
            for part in json.loads(path.read_text())["seeds"]:
                number = part["seed"]
                beside = measured.get(number) or seeds.get(number)
                measured[number] = _with(beside, part, path)
        found.append(Subject(paths, known[key].content, list(measured.values())))
    return found


def _with(seed: Seed | None, part: dict, path: Path) -> Seed:
    """A seed of the quality protocol with what effort.py adds to it."""
    losses = part["held_out_losses"]
    dense = seed.losses["dense"] if seed else None
    if seed is None or dense is None or len(dense) != len(losses["dense"]):
        raise ValueError(f"{path.name}: seed {part['seed']} must be one of quality-*.json")
    if any(abs(a - b) > SAME for a, b in zip(dense, losses["dense"], strict=True)):
        raise ValueError(
            f"{path.name}: seed {part['seed']} must be of the windows of quality-*.json"
        )
    rows = {(_way(row["way"]), row["removed"]): row for row in part["rows"]}
    return Seed(seed.number, {**rows, **seed.rows}, {**losses, **seed.losses})


def _way(name: str) -> str:
    """The name of a way as quality.py has it, so that what both measured is one."""
    if name.startswith("greedy, "):
        return f"greedy perplexity, {name.removeprefix('greedy, ')}"
    return "block-influence" if name == "block influence" else f"effort {name}"


def summary(subjects: Sequence[Subject]) -> list[str]:
    """For each model, text and number of layers: perplexities, divided by those of `normal`."""
    cases = [(subject, count) for subject in subjects for count in subject.counts]
    run = {way for subject, count in cases for way in subject.ways(count)}
    ways = [way for way in (*EFFORTS, *RIVALS) if way in run]
    rows = [
        (
            subject.model,
            subject.text,
            ", ".join(str(seed.number) for seed in subject.seeds),
            count,
            _share(subject, count),
            *(ratio_cell(subject, way, count, BASE) for way in ways),
        )
        for subject, count in cases
        if ratio(subject, BASE, count, BASE)
    ]
    heads = ("model", "text", "seeds", "layers removed", "cost of normal")
    return gpu_page.table((*heads, *(told(way).removeprefix("effort ") for way in ways)), rows)


def _share(subject: Subject, count: int) -> str:
    """What `normal` cost, of greedy search."""
    found = [seed.rows.get((BASE, count)) for seed in subject.seeds]
    return f"{max(row['share_of_greedy'] for row in found if row):.2f}"


def averages(subjects: Sequence[Subject]) -> str:
    """In words, for every other way: of how many cases, from where to where, and their mean."""
    parts = []
    for way in (*EFFORTS, *RIVALS):
        pairs = [(s, count) for s in subjects for count in s.counts if way in s.ways(count)]
        values = [found.value for s, count in pairs if (found := ratio(s, way, count, BASE))]
        if values:
            mean = math.exp(statistics.fmean(map(math.log, values)))
            parts.append(
                f"{told(way)} {mean:.2f} ({min(values):.2f} to {max(values):.2f}, {len(values)} "
                f"case{'s'[: len(values) > 1]})"
            )
    return "; ".join(parts)
