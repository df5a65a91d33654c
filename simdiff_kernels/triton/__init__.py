"""Triton kernels, for GPUs without the CUDA part: row sums, and their fold into running states."""

from simdiff_kernels.triton.fold import accumulate, fold, token_metrics
from simdiff_kernels.triton.row_sums import row_sums

__all__ = ["accumulate", "fold", "row_sums", "token_metrics"]
