"""Tables and the plot of what calibration_study.py measured.

python benchmarks/calibration_tables.py RESULT.json ... --output PICTURE.png
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TOKENS = 8192
LENGTH = 512
EFFORTS = ("none", "quick")
HELD_OUT = ("wikipedia", "python")


def ratios(content: Mapping[str, Any], effort: str, removed: int, text: str) -> dict[str, float]:
    """Perplexities by setting, divided by that of the base."""
    rows = [
        row for row in content["rows"] if row.get("effort") == effort and row["removed"] == removed
    ]
    means = {f"{row['axis']}: {row['setting']}": statistics.fmean(row[text]) for row in rows}
    base = means.pop("base: base")
    return {name: math.exp(mean - base) for name, mean in means.items()}


def counts(content: Mapping[str, Any]) -> list[int]:
    """Numbers of layers removed."""
    return sorted({row["removed"] for row in content["rows"] if "removed" in row})


def table(contents: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Heads and rows: ratios by setting, over models and numbers of layers, mean and extremes."""
    found: dict[str, dict[tuple[str, str], list[float]]] = {}
    columns = [(text, effort) for text in HELD_OUT for effort in EFFORTS]
    for content in contents:
        for text, effort in columns:
            for removed in counts(content):
                for name, value in ratios(content, effort, removed, text).items():
                    found.setdefault(name, {}).setdefault((text, effort), []).append(value)
    heads = ("setting", *(f"{text}, {effort}" for text, effort in columns))
    order = sorted(found, key=lambda name: name.partition(":")[0])
    return heads, [(name, *(_cell(found[name][column]) for column in columns)) for name in order]


def _cell(values: Sequence[float]) -> str:
    mean = math.exp(statistics.fmean(map(math.log, values)))
    return f"{mean:.2f} ({min(values):.2f} to {max(values):.2f})"


def plot(contents: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Ratios to the base by setting, a panel for each held-out text; scores alone and quick."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    names = list(
        dict.fromkeys(
            name
            for content in contents
            for name in ratios(content, EFFORTS[0], counts(content)[0], HELD_OUT[0])
        )
    )
    names.sort(key=lambda name: name.partition(":")[0])
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    panels = figure.subplots(1, len(HELD_OUT), sharey=True, sharex=True)
    colours = ("#0072b2", "#d55e00", "#009e73")
    for panel, text in zip(panels, HELD_OUT, strict=True):
        for colour, content in zip(colours, contents, strict=False):
            for effort, marker in zip(EFFORTS, "ox", strict=True):
                for place, count in enumerate(counts(content)):
                    found = ratios(content, effort, count, text)
                    panel.plot(
                        list(found.values()),
                        [names.index(name) for name in found],
                        marker,
                        color=colour,
                        markersize=4 + 3 * place,
                        fillstyle="none",
                        label=f"{content['model']['name']}, {count} layers, {effort}",
                    )
        panel.axvline(1, color="0.6", linewidth=0.8)
        panel.set_xscale("log")
        low, high = panel.get_xlim()
        ticks = [0.7, 0.8, 0.9, 1, 1.25, 1.5, 2, 3] if high < 4 * low else [0.5, 1, 2, 5, 10, 20]
        panel.set_xticks([tick for tick in ticks if low <= tick <= high])
        panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        panel.xaxis.set_minor_formatter(lambda *_: "")
        panel.set_title(f"held-out {text}")
        panel.set_xlabel("perplexity, divided by that of the base (1 is 16 × 512 of Wikipedia)")
        panel.grid(axis="y", color="0.9")
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Draw the plot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    plot([json.loads(path.read_text()) for path in given.results], given.output)


if __name__ == "__main__":
    main()
