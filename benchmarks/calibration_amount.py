r"""How much calibration text is enough: plans from 1 to 64 windows against a plan from 64 others.

    python benchmarks/calibration_amount.py demo --window-length 256 --resamples 60 \
        --output benchmarks/results/calibration-amount

One pass over 128 windows keeps the statistics of each; those of any few are made from them. The
last 64 windows give the plan to be found. Of the first 64, disjoint runs of 1, 2, 4, ... windows
give plans of their own, at most eight runs each. Written for every run, as CSV and as a plot of the
means: the share of layers that its plan has in common with the plan of the 64 other windows, the
median over layers of the relative error of importance, and the share of bootstrap draws of its
windows that give its plan again, which is all that `--calibrate-until-stable` can see. Plans are
those of scores alone.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from collections.abc import Iterator
from pathlib import Path

import provenance
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from simdiff.bootstrap import draws, resampled
from simdiff.calibration import token_windows
from simdiff.machine import describe_machine
from simdiff.models import load_model
from simdiff.planning import make_plan
from simdiff.report.plots import GRID, png
from simdiff.scores import LayerScores, score
from simdiff.selection import PruningPlan

MOST_RUNS = 8
COLORS = ("#0b6e99", "#c8442d", "#5b7083", "#8a6d1f")
MARKERS = ("^-", "o-", "s--", "x:")


def plans_of(
    scores: LayerScores, weights: torch.Tensor, count: int, criterion: str
) -> Iterator[PruningPlan]:
    for drawn in resampled(scores, weights):
        yield make_plan(drawn, count, criterion=criterion)


def measured(
    scores: LayerScores, count: int, criterion: str, half: int, num_resamples: int
) -> Iterator[dict[str, object]]:
    """One row for every run of windows."""
    whole = torch.zeros(1, 2 * half, dtype=torch.int64)
    whole[:, half:] = 1
    (wanted,) = plans_of(scores, whole, count, criterion)
    size = 1
    while size <= half:
        for run in range(min(half // size, MOST_RUNS)):
            windows = slice(run * size, (run + 1) * size)
            weights = torch.zeros(1 + num_resamples, 2 * half, dtype=torch.int64)
            weights[0, windows] = 1
            weights[1:, windows] = draws(size, num_resamples, seed=run)
            plan, *again = plans_of(scores, weights if size > 1 else weights[:1], count, criterion)
            same = [set(other.removed) == {*plan.removed} for other in again]
            errors = [abs(a / b - 1) for a, b in
                      zip(plan.importance, wanted.importance, strict=True)]  # fmt: skip
            yield {
                "removed": count,
                "windows": size,
                "run": run,
                "overlap": round(len({*plan.removed} & {*wanted.removed}) / count, 4),
                "importance_error": round(statistics.median(errors), 6),
                "agreement": round(sum(same) / len(same), 4) if same else "",
                "layers": " ".join(map(str, sorted(plan.removed))),
            }
        size *= 2


PANELS = (
    ("overlap", "share of layers in common with\nthe plan of the other half"),
    ("importance_error", "relative error of importance,\nmedian over layers"),
    ("agreement", "share of bootstrap draws\nwith the same plan"),
)


def plot(rows: list[dict[str, object]], title: str) -> bytes:
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    panels = figure.subplots(1, len(PANELS))
    counts = sorted({int(str(row["removed"])) for row in rows})
    for axes, (name, text) in zip(panels, PANELS, strict=True):
        for place, count in enumerate(counts):
            if place == 0 or name != "importance_error":  # which does not depend on the number
                _line(axes, [row for row in rows if row["removed"] == count], name, place, count)
        sizes = sorted({int(str(row["windows"])) for row in rows})
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.set_xlabel("windows of calibration text")
        axes.set_title(text, loc="left", fontsize="medium")
        axes.grid(color=GRID, linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
        if name == "importance_error":
            axes.set_yscale("log")
        else:
            axes.set_ylim(0, 1.03)
    panels[-1].axhline(0.95, color="#1b1f24", linewidth=0.9, linestyle="--")
    panels[-1].annotate("0.95", (1, 0.95), xytext=(0, -10), textcoords="offset points",
                        fontsize="small")  # fmt: skip
    figure.suptitle(title, x=0.01, ha="left", fontsize="large")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower right", ncols=len(counts), frameon=False)
    return png(figure)


def _line(axes: Axes, rows: list[dict[str, object]], name: str, place: int, count: int) -> None:
    color, marker = COLORS[place % len(COLORS)], MARKERS[place % len(MARKERS)]
    values: dict[int, list[float]] = {}
    for row in rows:
        if row[name] != "":
            values.setdefault(int(str(row["windows"])), []).append(float(str(row[name])))
    sizes = sorted(values)
    means = [statistics.mean(values[size]) for size in sizes]
    axes.fill_between(sizes, [min(values[s]) for s in sizes], [max(values[s]) for s in sizes],
                      color=color, alpha=0.12, linewidth=0)  # fmt: skip
    axes.plot(sizes, means, marker, color=color, markersize=5, label=f"{count} layers removed")


def main() -> None:
    """Parse, run, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--text", default="demo")
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 12])
    parser.add_argument("--criterion", default="simdiff")
    parser.add_argument("--half", type=int, default=64, help="windows in each half, a power of 2")
    parser.add_argument("--window-length", type=int, default=512)
    parser.add_argument("--resamples", type=int, default=100)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--output", type=Path, required=True, help="without .csv and .png")
    options = parser.parse_args()
    model, tokenizer = load_model(options.model, dtype=options.dtype)
    windows = token_windows(options.text, tokenizer, num_windows=2 * options.half,
                            window_length=options.window_length)  # fmt: skip
    if len(windows.tokens) < 2 * options.half:
        parser.error(f"the text must fill {2 * options.half} windows, got {len(windows.tokens)}")
    scores = score(model, windows.batches(8), groups=2 * options.half)
    rows = [
        row
        for count in options.layers
        for row in measured(scores, count, options.criterion, options.half, options.resamples)
    ]
    with open(options.output.with_suffix(".csv"), "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    title = (
        f"{options.model}, {options.criterion}, windows of {options.window_length} tokens, "
        f"{options.dtype}"
    )
    options.output.with_suffix(".png").write_bytes(plot(rows, title))
    files = [options.output.with_suffix(kind) for kind in (".csv", ".png")]
    provenance.keep(files, ["calibration pass", "planning"])
    print(f"{options.output}.csv and .png, on {describe_machine()}")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
