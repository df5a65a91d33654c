"""The figures of tasks: a section of docs/figures.md, and rows of the table of README.md."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from committed_results import MACHINE, Results, joined, lines, paragraph
from gpu_page import table

MODELS = ("dense", "pruned", "repaired")
# The kinds of tasks, and what the average that nothing can spoil leaves out.
KINDS = {"classification": "tasks at chance", "generation": "tasks near 0"}


@dataclass(frozen=True)
class Answers:
    """Which items of the tasks of one kind each model got right."""

    items: dict[str, dict[str, list[float]]]
    """By model and task."""
    tasks: list[str]
    above: list[str]
    """The tasks on which the dense model is above chance."""

    def mean(self, model: str, of: Sequence[str]) -> float:
        """The mean over tasks of the share of right items."""
        return statistics.fmean(statistics.fmean(self.items[model][task]) for task in of)

    def retained(self, model: str, of: Sequence[str]) -> tuple[float, float]:
        """The ratio to the dense model's mean, its standard error from the pairs of items."""
        whole, variance = self.mean("dense", of), 0.0
        ratio = self.mean(model, of) / whole
        for task in of:
            pairs = zip(self.items[model][task], self.items["dense"][task], strict=True)
            gaps = [after - ratio * before for after, before in pairs]
            variance += statistics.variance(gaps) / len(gaps)
        return ratio, math.sqrt(variance) / len(of) / whole


def answers(found: Results) -> dict[str, Answers]:
    """Those of each kind of which there are tasks."""
    content = found.json(f"tasks-{MACHINE}")
    names = dict(zip(MODELS, content["models"], strict=True))
    scores = {name: content["models"][key]["tasks"] for name, key in names.items()}
    by_kind: dict[str, list[str]] = {}
    for task, dense in scores["dense"].items():
        if len({of[task]["items_sha256"] for of in scores.values()}) > 1:
            raise SystemExit(f"figures: all models must have been asked the same items of {task}")
        by_kind.setdefault("classification" if dense["chance"] else "generation", []).append(task)
    return {
        kind: Answers(
            {
                name: {task: [*map(float, of[task]["items"])] for task in tasks}
                for name, of in scores.items()
            },
            tasks,
            [task for task in tasks if not scores["dense"][task]["at_chance"]],
        )
        for kind, tasks in by_kind.items()
    }


def tasks(found: Results) -> str:
    kinds = answers(found)
    asked: dict[str, Any] = found.json(f"tasks-{MACHINE}")["tasks"]
    (count,) = {len(items) for of in kinds.values() for items in of.items["dense"].values()}
    error = max(
        math.sqrt(statistics.variance(items) / count)
        for of in kinds.values()
        for by_task in of.items.values()
        for items in by_task.values()
    )
    parts = []
    for kind, of in kinds.items():
        rows = [
            (
                name,
                *(f"{100 * of.mean(name, [task]):.0f}" for task in of.tasks),
                *(_mean(of, name, some) for some in (of.tasks, of.above)),
            )
            for name in MODELS
        ]
        rows += [
            (
                f"{name}, retained",
                *[""] * len(of.tasks),
                *(_retained(of, name, some) for some in (of.tasks, of.above)),
            )
            for name in MODELS[1:]
        ]
        out = " and ".join(task for task in of.tasks if task not in of.above)
        parts += [
            lines(table((kind, *of.tasks, "average", f"without {KINDS[kind]}"), rows)),
            _left_out(kind, out),
        ]
    shots = {task: of["num_fewshot"] for task, of in asked["tasks"].items() if "num_fewshot" in of}
    shown = [f"{task} {number}" for task, number in shots.items() if number]
    return joined(
        "## Tasks",
        paragraph(
            "The demo's pruned model before and after the repair below, accuracy in percent of "
            f"{count} items of each task, drawn at random and the same for all models; a standard "
            f"error is {100 * error:.0f} points or less {found.origin(f'tasks-{MACHINE}.json')}. A "
            "test compares five items each of most of these tasks with lm_eval's own evaluation.",
            f"Solved examples before each item: {', '.join(shown)}, none otherwise." * bool(shown),
        ),
        *parts,
    )


def _mean(of: Answers, model: str, some: Sequence[str]) -> str:
    return f"{100 * of.mean(model, some):.1f}" if some else "none"


def _retained(of: Answers, model: str, some: Sequence[str]) -> str:
    if not some or of.mean("dense", some) == 0:
        return "none"
    ratio, error = of.retained(model, some)
    return f"{100 * ratio:.0f} ± {100 * error:.0f}%"


def _left_out(kind: str, out: str) -> str:
    if not out:
        return ""
    if kind == "generation":
        return paragraph(f"The dense model writes next to no right answer in {out}.")
    return paragraph(f"The dense model is at chance on {out}, where pruning cannot show.")


def averages(found: Results) -> list[tuple[str, str, str, str, str]]:
    """Rows of README.md: label, dense, pruned, its ratio, repaired; both kinds, or none.

    Classification alone is not shown: it hides what a cut costs.
    """
    kinds = answers(found)
    if not all(kind in kinds and kinds[kind].above for kind in KINDS):
        return []
    rows = []
    for kind in KINDS:
        of = kinds[kind]
        dense, pruned, repaired = (f"{100 * of.mean(name, of.above):.1f}" for name in MODELS)
        ratio = f"{of.retained('pruned', of.above)[0]:.2f}"
        label = f"{kind}, {len(of.above)} task{'s'[: len(of.above) > 1]}, average %"
        rows.append((label, dense, pruned, ratio, repaired))
    return rows
