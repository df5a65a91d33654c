"""Fast layer scorers for depth pruning: similarity and difference of hidden states in one read."""

from importlib.metadata import PackageNotFoundError, version

from simdiff_kernels.backends import BACKENDS, BackendStatus, backend_status, default_backend
from simdiff_kernels.blocks import (
    BlockScratch,
    BlockSummary,
    RunningBlockScores,
    accumulate_blocks,
    block_summary_of,
    empty_block_state,
    join_block_states,
)
from simdiff_kernels.metrics import (
    APART,
    BLOCK_METRICS,
    COUNTED,
    LEFT_OUT,
    METRICS,
    ROW_SUMS,
    TokenMetrics,
    angular_distance,
)
from simdiff_kernels.ops import fold, row_sums, token_metrics
from simdiff_kernels.running import (
    MetricSummary,
    NonFiniteError,
    RunningScores,
    RunningSummary,
    empty_state,
    join_states,
    summary_of,
)

try:
    __version__ = version("simdiff-kernels")
except PackageNotFoundError:  # the source tree on the path, not installed
    __version__ = "unknown"

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
