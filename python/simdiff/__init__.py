"""Depth pruning of language models: calibrate, score, plan, prune, evaluate, recover, report.

The functions of this package are those of the command, `simdiff.score(model, text)` for
`simdiff score`, and so on; see docs/python.md. They are imported when they are first used, so that
`simdiff --help` does not wait for torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from simdiff.api import evaluate, plan, prune, recover, score
    from simdiff.data.documents import TextFile, TextMix
    from simdiff.data.text_options import TextOptions
    from simdiff.errors import SimdiffError
    from simdiff.evaluation.quality import Quality
    from simdiff.evaluation.tasks import TaskOptions
    from simdiff.jobs.stability import ScoringOptions
    from simdiff.planning.budget import Budget
    from simdiff.planning.criteria import Criterion
    from simdiff.planning.options import PlanOptions
    from simdiff.planning.plan import PruningPlan
    from simdiff.recovery.record import RecoveryRecord
    from simdiff.scoring.scores import LayerScores

_HOMES = {
    "Budget": "simdiff.planning.budget",
    "Criterion": "simdiff.planning.criteria",
    "LayerScores": "simdiff.scoring.scores",
    "PlanOptions": "simdiff.planning.options",
    "PruningPlan": "simdiff.planning.plan",
    "Quality": "simdiff.evaluation.quality",
    "RecoveryRecord": "simdiff.recovery.record",
    "ScoringOptions": "simdiff.jobs.stability",
    "SimdiffError": "simdiff.errors",
    "TaskOptions": "simdiff.evaluation.tasks",
    "TextFile": "simdiff.data.documents",
    "TextMix": "simdiff.data.documents",
    "TextOptions": "simdiff.data.text_options",
    "evaluate": "simdiff.api",
    "plan": "simdiff.api",
    "prune": "simdiff.api",
    "recover": "simdiff.api",
    "score": "simdiff.api",
}

__all__ = [
    "Budget",
    "Criterion",
    "LayerScores",
    "PlanOptions",
    "PruningPlan",
    "Quality",
    "RecoveryRecord",
    "ScoringOptions",
    "SimdiffError",
    "TaskOptions",
    "TextFile",
    "TextMix",
    "TextOptions",
    "evaluate",
    "plan",
    "prune",
    "recover",
    "score",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
