"""Fast layer scorers for depth pruning: similarity and difference of hidden states in one read.

Names and constants are here at once; torch is imported, and the operators
`torch.ops.simdiff_kernels` are registered, when a function or a class is first taken from here (or
by `import simdiff_kernels.ops`).
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from simdiff_kernels.names import (
    APART,
    BACKENDS,
    BLOCK_METRICS,
    COUNTED,
    LEFT_OUT,
    METRICS,
    ROW_SUMS,
    TokenMetrics,
)

if TYPE_CHECKING:
    from simdiff_kernels.backends import BackendStatus, backend_status, default_backend
    from simdiff_kernels.blocks import BlockScratch, RunningBlockScores, accumulate_blocks
    from simdiff_kernels.metrics import angular_distance
    from simdiff_kernels.ops import fold, row_sums, token_metrics
    from simdiff_kernels.running import RunningScores
    from simdiff_kernels.running_states import (
        empty_block_state,
        empty_state,
        join_block_states,
        join_states,
    )
    from simdiff_kernels.summaries import (
        BlockSummary,
        MetricSummary,
        NonFiniteError,
        RunningSummary,
        block_summary_of,
        summary_of,
    )

try:
    __version__ = version("simdiff-kernels")
except PackageNotFoundError:  # the source tree on the path, not installed
    __version__ = "unknown"

_MODULES = {
    "backends": (
        "BackendStatus",
        "backend_status",
        "default_backend",
    ),
    "blocks": ("BlockScratch", "RunningBlockScores", "accumulate_blocks"),
    "metrics": ("angular_distance",),
    "ops": (
        "fold",
        "row_sums",
        "token_metrics",
    ),
    "running": ("RunningScores",),
    "running_states": ("empty_block_state", "empty_state", "join_block_states", "join_states"),
    "summaries": (
        "BlockSummary",
        "MetricSummary",
        "NonFiniteError",
        "RunningSummary",
        "block_summary_of",
        "summary_of",
    ),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "APART",
    "BACKENDS",
    "BLOCK_METRICS",
    "COUNTED",
    "LEFT_OUT",
    "METRICS",
    "ROW_SUMS",
    "BackendStatus",
    "BlockScratch",
    "BlockSummary",
    "MetricSummary",
    "NonFiniteError",
    "RunningBlockScores",
    "RunningScores",
    "RunningSummary",
    "TokenMetrics",
    "accumulate_blocks",
    "angular_distance",
    "backend_status",
    "block_summary_of",
    "default_backend",
    "empty_block_state",
    "empty_state",
    "fold",
    "join_block_states",
    "join_states",
    "row_sums",
    "summary_of",
    "token_metrics",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(f"simdiff_kernels.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    if name in _MODULES or name in ("metrics", "reference"):  # modules that were always at hand
        return import_module(f"simdiff_kernels.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
