"""What the trackers of `--log` are told of a finished run, comparison or recovery."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simdiff.comparison.results import Comparison
from simdiff.data.documents import source_name
from simdiff.data.text_options import TextOptions
from simdiff.io.kinds import COMPARISON_MARKER, PLAN_FILE
from simdiff.io.trackers import Log
from simdiff.planning.plan import PruningPlan
from simdiff.provenance.origin import CARD
from simdiff.recovery.record import RECORD, RecoveryRecord

if TYPE_CHECKING:
    from simdiff.jobs.run import RunOutcome

_METRICS = ("cosine_distance", "squared_difference", "absolute_difference")


def options_told(
    command: str, model: str, text: TextOptions, options: Mapping[str, Any]
) -> dict[str, Any]:
    """The options of a call as trackers get them: of a text its name, not its documents."""
    source = {**vars(text), "source": source_name(text.source)}
    return {"command": command, "model": model, **source, **options}


def run_tracked(log: Log, outcome: RunOutcome) -> None:
    """The layers with their scores, the plan, quality and speed, and the report."""
    scores = outcome.scores
    metrics = [name for name in _METRICS if name in scores.metrics]
    rows = [
        [
            layer,
            layer in outcome.plan.removed,
            *(scores.metrics[name].mean[layer] for name in metrics),
        ]
        for layer in range(scores.num_layers)
    ]
    log.table("layers", ["layer", "removed", *metrics], rows)
    _plan(log, outcome.plan)
    log.metrics(_numbers({name: outcome.results[name] for name in ("dense", "pruned")}))
    for name in ("report.html", PLAN_FILE, "results.json"):
        log.file(outcome.directory / name)


def comparison_tracked(log: Log, comparison: Comparison, directory: Path) -> None:
    """One row for each criterion at each number of layers, the best of them, and the page."""
    columns = ("criterion", "num_removed", "removed", "perplexity", "ratio", "seconds_to_plan")
    rows = [
        (
            entry.cell.criterion,
            entry.cell.num_remove,
            ",".join(map(str, entry.removed)),
            None if entry.quality is None else entry.quality.perplexity,
            None if entry.quality is None else entry.quality.ratio,
            entry.cell.seconds,
        )
        for entry in comparison.cells
    ]
    log.table("comparison", columns, rows)
    for criterion, count, _, perplexity, _, _ in rows:
        log.metrics({f"perplexity/{criterion}": perplexity}, step=count)
    for name in ("compare.html", "compare.csv", COMPARISON_MARKER):
        log.file(directory / name)


def recovery_tracked(log: Log, record: RecoveryRecord, directory: Path) -> None:
    """The plan, the quality of the three models, the record and the card."""
    _plan(log, PruningPlan.load(directory / PLAN_FILE))
    log.metrics(_numbers(record.quality) | {"seconds": record.seconds})
    for name in (RECORD, PLAN_FILE, CARD):
        log.file(directory / name)


def _plan(log: Log, plan: PruningPlan) -> None:
    rows = [(number, layer) for number, layer in enumerate(plan.removed, 1)]
    log.table("plan", ("order", "removed_layer"), rows)
    log.metrics({"num_removed": len(plan.removed), "num_layers": plan.num_layers})


def _numbers(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Numbers in nested mappings, by their paths."""
    found: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found[f"{prefix}{key}"] = value
    return found
