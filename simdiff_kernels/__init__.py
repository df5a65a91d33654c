"""Fast layer scorers for depth pruning: similarity and difference of hidden states in one read.

Names and constants are here at once; torch is imported, and the operators
`torch.ops.simdiff_kernels` are registered, when a function or a class is first taken from here (or
by `import simdiff_kernels.ops`).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .names import (
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
    from .backends import BackendStatus, backend_status, default_backend
    from .blocks import BlockScratch, RunningBlockScores, accumulate_blocks
    from .installation import describe_installation, installation_advice
    from .metrics import angular_distance
    from .ops import fold, row_sums, token_metrics
    from .running import RunningScores
    from .running_states import (
        empty_block_state,
        empty_state,
        join_block_states,
        join_states,
    )
    from .summaries import (
        BlockSummary,
        MetricSummary,
        NonFiniteError,
        RunningSummary,
        block_summary_of,
        summary_of,
    )

_MODULES = {
    "backends": (
        "BackendStatus",
        "backend_status",
        "default_backend",
    ),
    "blocks": ("BlockScratch", "RunningBlockScores", "accumulate_blocks"),
    "installation": ("describe_installation", "installation_advice"),
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
    "describe_installation",
    "empty_block_state",
    "empty_state",
    "fold",
    "installation_advice",
    "join_block_states",
    "join_states",
    "row_sums",
    "summary_of",
    "token_metrics",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
        globals()[name] = value
        return value
    if name in _MODULES or name in ("metrics", "reference"):  # modules that were always at hand
        return import_module(f".{name}", __name__)
    if name == "__version__":
        globals()[name] = _version()
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _version() -> str:
    """Of the distribution; not of the source tree on the path, nor of a kernel from the hub."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("simdiff-kernels") if __name__ == "simdiff_kernels" else "unknown"
    except PackageNotFoundError:
        return "unknown"


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
