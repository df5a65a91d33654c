"""docs/quality.md and README's summary of it, from the results of the quality protocol.

    python benchmarks/quality_tables.py           # writes both
    python benchmarks/quality_tables.py --check   # exit code 1 where it would write something else

A ratio of two ways is exp of the mean over seeds of the mean over windows of the difference of
their losses on the same windows, with a 95% interval by Student's t: for seeds i of n_i windows and
standard deviations s_i, the standard error is sqrt(sum s_i^2 / n_i) / seeds, on sum (n_i - 1)
degrees of freedom. It says what another text of this kind would do with these plans, not what
another seed would choose.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from models import LICENCES

from simdiff.intervals import student_quantile

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "quality.md"
OURS = "simdiff + reads"
BASELINES = (
    "simdiff", "block-influence", "block-influence + reads", "cosine-block",
    "one-shot perplexity, 4 windows", "greedy perplexity, 1 windows",
    "greedy perplexity, 4 windows", "greedy perplexity, 16 windows",
)  # fmt: skip
"""In the summary, as far as they were run."""


@dataclass
class Case:
    """One model on one text: what every way chose by seed, and the held-out losses of all plans."""

    model: str
    text: str
    origin: dict[str, Any]
    """Of the first file: settings, model, versions, commit, machine."""
    rows: dict[tuple[str, int], dict[int, dict[str, Any]]] = field(default_factory=dict)
    losses: dict[int, dict[str, list[float] | None]] = field(default_factory=dict)
    licences: set[str] = field(default_factory=set)

    @property
    def counts(self) -> list[int]:
        """Numbers of removed layers."""
        return sorted({count for _, count in self.rows})

    @property
    def ways(self) -> list[str]:
        """In the order of the script."""
        return list(dict.fromkeys(way for way, _ in self.rows))

    def windows(self, way: str, count: int, seed: int) -> list[float] | None:
        """Losses of the plan that a way chose; None where it was not run or cannot be measured."""
        row = self.rows.get((way, count), {}).get(seed)
        return None if row is None or not row["layers"] else self.losses[seed][row["layers"]]

    def perplexities(self, way: str, count: int) -> list[float]:
        """Of each seed that was run."""
        found = [self.windows(way, count, seed) for seed in sorted(self.losses)]
        return [math.exp(min(statistics.fmean(v), 700)) for v in found if v is not None]


def load(folder: Path) -> list[Case]:
    """All cases of a folder; a file named *-all.json adds ways to the seeds of another."""
    cases: dict[tuple[str, str], Case] = {}
    for path in sorted(folder.glob("quality-*.json"), key=lambda p: (p.stem.endswith("-all"), p)):
        content = json.loads(path.read_text())
        key = content["model"]["name"], content["settings"]["text"]
        case = cases.setdefault(key, Case(*key, content))
        for seed in content["seeds"]:
            case.losses.setdefault(seed["seed"], {}).update(seed["held_out_losses"])
            case.licences.add(seed["licence"])
            for row in seed["rows"]:
                found = case.rows.setdefault((row["way"], row["removed"]), {})
                found.setdefault(seed["seed"], row)
    return list(cases.values())


@dataclass(frozen=True)
class Ratio:
    """Of two perplexities on the same windows."""

    value: float
    low: float
    high: float
    seeds: int
    same: bool
    """Both are one plan, in every seed."""

    def __str__(self) -> str:
        if self.same:
            return "same plan"
        text = f"{number(self.value)} [{number(self.low)}, {number(self.high)}]"
        return f"{text} not distinguishable" if self.low <= 1 <= self.high else text


def ratio(case: Case, way: str, count: int, to: str = OURS) -> Ratio | None:
    """How many times the perplexity of another way; None without a seed that ran both."""
    gaps, same = [], True
    for seed in sorted(case.losses):
        ours, theirs = (case.windows(name, count, seed) for name in (to, way))
        if ours is None or theirs is None:
            continue
        gaps.append([b - a for a, b in zip(ours, theirs, strict=True)])
        plans = [case.rows[name, count][seed]["layers"] for name in (to, way)]
        same = same and plans[0] == plans[1]
    if not gaps:
        return None
    mean = statistics.fmean(statistics.fmean(gap) for gap in gaps)
    variance = sum(statistics.variance(gap) / len(gap) for gap in gaps) / len(gaps) ** 2
    reach = student_quantile(sum(len(gap) - 1 for gap in gaps)) * math.sqrt(variance)
    limits = (math.exp(min(value, 700)) for value in (mean, mean - reach, mean + reach))
    return Ratio(*limits, len(gaps), same)


def number(value: float) -> str:
    """Three digits, or a power of ten."""
    if value >= 10_000:
        return f"{value:.0e}"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def name_of(case: Case) -> str:
    """A model and a text."""
    return f"{case.model}, {case.text}"


def summary(cases: Sequence[Case]) -> str:
    """Every case against the baselines."""
    shown = [way for way in BASELINES if any((way, n) in c.rows for c in cases for n in c.counts)]
    rows = []
    for case in cases:
        for count in case.counts:
            cells = [ratio(case, way, count) for way in shown]
            own = case.perplexities(OURS, count)
            rows.append([name_of(case), str(count), number(statistics.geometric_mean(own)),
                         *("" if cell is None else str(cell) for cell in cells)])  # fmt: skip
    return table(["model, text", "layers removed", f"`{OURS}`", *shown], rows)


def section(case: Case) -> Iterator[str]:
    """All ways of one case."""
    settings, seeds = case.origin["settings"], sorted(case.losses)
    dense = [math.exp(statistics.fmean(case.losses[s]["dense"] or [])) for s in seeds]
    yield f"## {name_of(case)}"
    yield (
        f"Seeds {', '.join(map(str, seeds))}; dense {', '.join(f'{p:.2f}' for p in dense)}. "
        f"{settings['windows']} windows of {settings['window_length']} tokens calibrate, "
        f"{settings['held_out_windows']} of {settings['held_out_length']} are held out for each "
        f"seed; {settings['dtype']}; {', '.join(sorted(case.licences))}; commit "
        f"{case.origin['commit']}; {case.origin['machine']}, {case.origin['threads']} threads."
    )
    for count in case.counts:
        rows = []
        for way in case.ways:
            runs = case.rows.get((way, count))
            if not runs:
                continue
            found, told = case.perplexities(way, count), ratio(case, way, count)
            problem = next((row["problem"] for row in runs.values() if row["problem"]), None)
            rows.append([
                way, number(statistics.geometric_mean(found)) if found else "",
                ", ".join(map(number, found)) or str(problem),
                "" if way == OURS or told is None else str(told),
                number_of(row["windows_read"] for row in runs.values()),
                f"{statistics.fmean(row['seconds'] for row in runs.values()):.0f}",
            ])  # fmt: skip
        yield f"{count} layers removed:"
        yield table(
            ["way", "perplexity", "by seed", f"× `{OURS}`", "windows read", "seconds"], rows
        )


def number_of(values: Iterable[int]) -> str:
    """One number, or from the least to the most."""
    found = sorted(values)
    return str(found[0]) if found[0] == found[-1] else f"{found[0]} to {found[-1]}"


def page(cases: Sequence[Case]) -> str:
    """docs/quality.md."""
    origins = {case.model: case.origin["model"]["converted_from"] for case in cases}
    models = "; ".join(
        f"{model} ({LICENCES.get(model, 'licence not known')}): "
        + ("not a conversion" if found is None else found.get("packages", found["file"]))
        for model, found in origins.items()
    )
    parts = [
        "# How good the plans are",
        "Written by `python benchmarks/quality_tables.py` from "
        "`benchmarks/results/quality-*.json`, which `python benchmarks/quality.py` makes (there: "
        "what every way is). The text is one that no decision about the method has seen "
        "(`benchmarks/texts.py`), divided anew by each seed. The perplexity is the geometric mean "
        "over seeds. Ratios are to that of "
        f"`{OURS}`, the default with a model at hand, with a 95% interval over windows for these "
        "plans; above 1 the default is better. Where 1 lies within, the two are not "
        "distinguishable. What has no number was not run: greedy search costs too much to run "
        "everywhere. The models are 4-bit files converted to plain checkpoints: "
        f"{models}. Seconds were taken on a machine with other load, one thread; they count the "
        "calibration pass where a way takes scores.",
        summary(cases),
        *(part for case in cases for part in section(case)),
    ]
    parts.append(
        "## Ablations\n\n"
        "What `simdiff` is without its exchanges, and with exponent 1, is in every table above. "
        "Before that, on other text (`benchmarks/results/development-*.json`, "
        "the development runs, of the code before those parts went), layers kept for writing a "
        "massive activation, four more exponents and a rule of two standard errors changed no "
        "plan in twelve cases; they were removed."
    )
    return "\n\n".join(parts) + "\n"


def spread(cases: Sequence[Case], way: str) -> str:
    """In how many of all cases a way is better, worse, or not distinguishable."""
    found = [ratio(case, way, count) for case in cases for count in case.counts]
    told = [r for r in found if r is not None]
    worse = sum(r.low > 1 and not r.same for r in told)
    better = sum(r.high < 1 and not r.same for r in told)
    return (f"better in {better}, worse in {worse}, the same or not distinguishable in "
            f"{len(told) - better - worse} of {len(told)} cases")  # fmt: skip


def block(cases: Sequence[Case]) -> str:
    """README's words."""
    models = list(dict.fromkeys(case.model for case in cases))
    texts = list(dict.fromkeys(case.text for case in cases))
    windows = {case.origin["settings"]["held_out_windows"] for case in cases}
    lines = [
        f"On text that no decision has seen ({', '.join(models)}; {' and '.join(texts)}; up to "
        f"{max(len(case.losses) for case in cases)} seeds, {min(windows)} held-out windows each; "
        "10% and 25% of the layers; [all ways, intervals and costs](docs/quality.md)), against "
        "the default with a model at hand:",
        "",
        *(f"- {way}: {spread(cases, way)};" for way in BASELINES
          if any((way, n) in c.rows for c in cases for n in c.counts)),
    ]  # fmt: skip
    lines[-1] = lines[-1].removesuffix(";") + "."
    return "\n".join(lines)


def with_block(text: str, content: str) -> str:
    """A page with the block between its marks replaced."""
    marks = r"(<!-- quality -->\n).*?(<!-- end -->)"
    if not re.search(marks, text, re.S):
        raise SystemExit("README.md must hold <!-- quality --> and <!-- end -->")
    return re.sub(marks, lambda m: f"{m[1]}{content}\n{m[2]}", text, count=1, flags=re.S)


def written(folder: Path = RESULTS) -> dict[Path, str]:
    """What every page must be."""
    cases = load(folder)
    if not cases:
        raise SystemExit(f"{folder} must hold quality-*.json, got none")
    readme = ROOT / "README.md"
    return {PAGE: page(cases), readme: with_block(readme.read_text(), block(cases))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    checking = parser.parse_args().check
    wrong = [p for p, text in written().items() if not p.exists() or p.read_text() != text]
    for path in wrong:
        print(f"{path.relative_to(ROOT)} {'differs' if checking else 'written'}")
        if not checking:
            path.write_text(written()[path])
    if checking and wrong:
        sys.exit(1)


if __name__ == "__main__":
    main()
