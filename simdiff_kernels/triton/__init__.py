"""Triton kernels, for GPUs without the CUDA part: row sums, and their fold into running states."""

from .fold import accumulate, fold, token_metrics
from .row_sums import row_sums

__all__ = ["accumulate", "fold", "row_sums", "token_metrics"]
