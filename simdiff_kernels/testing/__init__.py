"""For tests and benchmarks: one list of cases, the exact result, and what counts as accurate."""

from .accuracy import (
    SHORT_SUMS,
    check_angles,
    check_metrics,
    check_token_blocks,
    joined_state,
)
from .cases import (
    MASSIVE,
    BlockCase,
    Case,
    block_cases,
    cases,
    near,
    walk,
    with_strides,
)
from .exact import exact_block_metrics, exact_metrics

__all__ = [
    "MASSIVE",
    "SHORT_SUMS",
    "BlockCase",
    "Case",
    "block_cases",
    "cases",
    "check_angles",
    "check_metrics",
    "check_token_blocks",
    "exact_block_metrics",
    "exact_metrics",
    "joined_state",
    "near",
    "walk",
    "with_strides",
]
