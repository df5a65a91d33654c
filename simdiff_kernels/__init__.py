"""Fast layer scorers for depth pruning: similarity and difference of hidden states in one read."""

from importlib.metadata import PackageNotFoundError, version

from simdiff_kernels.backends import BACKENDS, BackendStatus, backend_status, default_backend
from simdiff_kernels.blocks import BlockSummary, RunningBlockScores
from simdiff_kernels.metrics import (
    BLOCK_METRICS,
    METRICS,
    ROW_SUMS,
    TokenMetrics,
    angular_distance,
)
from simdiff_kernels.ops import fold, row_sums, token_metrics
from simdiff_kernels.running import MetricSummary, NonFiniteError, RunningScores, RunningSummary

try:
    __version__ = version("simdiff-kernels")
except PackageNotFoundError:  # the source tree on the path, not installed
    __version__ = "unknown"

__all__ = [
    "BACKENDS",
    "BLOCK_METRICS",
    "METRICS",
    "ROW_SUMS",
    "BackendStatus",
    "BlockSummary",
    "MetricSummary",
    "NonFiniteError",
    "RunningBlockScores",
    "RunningScores",
    "RunningSummary",
    "TokenMetrics",
    "angular_distance",
    "backend_status",
    "default_backend",
    "fold",
    "row_sums",
    "token_metrics",
]
