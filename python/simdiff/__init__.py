"""Depth pruning of language models: calibrate, score, plan, prune, evaluate, recover, report.

Each command has its function, `simdiff.score(model, text)` for `simdiff score`, and so on; see
docs/python.md. They are imported when they are first used, so that
`simdiff --help` does not wait for torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from simdiff.api import evaluate, plan, prune, recover, score
    from simdiff.comparison.compare import ComparisonOptions
    from simdiff.data.documents import TextFile, TextMix
    from simdiff.data.text_options import TextOptions
    from simdiff.errors import Note, SimdiffError, SurgeryError
    from simdiff.evaluation.quality import Quality
    from simdiff.evaluation.tasks import TaskOptions
    from simdiff.io.ranks import processes
    from simdiff.jobs.compare import run_comparison
    from simdiff.jobs.doctor import diagnose
    from simdiff.jobs.run import run
    from simdiff.jobs.stability import ScoringOptions
    from simdiff.jobs.states import score_states
    from simdiff.models.streamed import StreamOptions
    from simdiff.planning.budget import Budget
    from simdiff.planning.criteria import Criterion
    from simdiff.planning.export import export_plan
    from simdiff.planning.options import PlanOptions
    from simdiff.planning.plan import PruningPlan
    from simdiff.provenance.verify import verify
    from simdiff.recovery.record import RecoveryRecord
    from simdiff.report.page import report_page
    from simdiff.scoring.profiling import profile_pass
    from simdiff.scoring.scores import LayerScores
    from simdiff.speed.bench import bench
    from simdiff.speed.protocol import Protocol

_HOMES = {
    "Budget": "simdiff.planning.budget",
    "ComparisonOptions": "simdiff.comparison.compare",
    "Criterion": "simdiff.planning.criteria",
    "LayerScores": "simdiff.scoring.scores",
    "Note": "simdiff.errors",
    "PlanOptions": "simdiff.planning.options",
    "Protocol": "simdiff.speed.protocol",
    "PruningPlan": "simdiff.planning.plan",
    "Quality": "simdiff.evaluation.quality",
    "RecoveryRecord": "simdiff.recovery.record",
    "ScoringOptions": "simdiff.jobs.stability",
    "SimdiffError": "simdiff.errors",
    "SurgeryError": "simdiff.errors",
    "StreamOptions": "simdiff.models.streamed",
    "TaskOptions": "simdiff.evaluation.tasks",
    "TextFile": "simdiff.data.documents",
    "TextMix": "simdiff.data.documents",
    "TextOptions": "simdiff.data.text_options",
    "bench": "simdiff.speed.bench",
    "diagnose": "simdiff.jobs.doctor",
    "evaluate": "simdiff.api",
    "export_plan": "simdiff.planning.export",
    "plan": "simdiff.api",
    "profile_pass": "simdiff.scoring.profiling",
    "processes": "simdiff.io.ranks",
    "prune": "simdiff.api",
    "recover": "simdiff.api",
    "report_page": "simdiff.report.page",
    "run": "simdiff.jobs.run",
    "run_comparison": "simdiff.jobs.compare",
    "score": "simdiff.api",
    "verify": "simdiff.provenance.verify",
    "score_states": "simdiff.jobs.states",
}

__all__ = [
    "Budget",
    "ComparisonOptions",
    "Criterion",
    "LayerScores",
    "Note",
    "PlanOptions",
    "Protocol",
    "PruningPlan",
    "Quality",
    "RecoveryRecord",
    "ScoringOptions",
    "SimdiffError",
    "StreamOptions",
    "SurgeryError",
    "TaskOptions",
    "TextFile",
    "TextMix",
    "TextOptions",
    "bench",
    "diagnose",
    "evaluate",
    "export_plan",
    "plan",
    "processes",
    "profile_pass",
    "prune",
    "recover",
    "report_page",
    "run",
    "run_comparison",
    "score",
    "score_states",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from simdiff_kernels import __version__

        return __version__
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
