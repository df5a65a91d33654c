"""The partial states of `accumulate`'s programs, in scratch memory, and the kernel that joins them.

A program's partial state is a column of 26 words: sums and counts, sums of squares, maxima,
indices of the maxima. One column per program and one size for all shapes: 208 KiB, of which
`num_programs` columns are written and read once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from simdiff_kernels.metrics import METRICS
from simdiff_kernels.triton.configurations import launch_options

NUM_METRICS = len(METRICS)
# The metric axis of a block: Triton's block sizes are powers of two. The two columns that are left
# count tokens, those averaged and those left out as not finite.
METRIC_BLOCK = 8
PARTIAL_BLOCK = 1024
SCRATCH_WORDS = (METRIC_BLOCK + 3 * NUM_METRICS) * PARTIAL_BLOCK
JOIN_THREADS = 512


@triton.jit(do_not_specialize=["num_programs", "num_tokens"])
def _join_partials_kernel(
    p_moments,
    p_tallies,
    p_scratch,
    num_programs,
    num_tokens,
    NUM_METRICS: tl.constexpr,
    METRIC_BLOCK: tl.constexpr,
    PARTIAL_BLOCK: tl.constexpr,
):
    """One program adds all partial states to the running state, always in the same order."""
    # A launch of its own: done in the main kernel by the last program to finish, it would cost all
    # programs its registers and have a quarter of the threads to read up to 208 KiB with.
    NO_PEAK: tl.constexpr = -0x10000000000000  # the bits of minus infinity
    LAST: tl.constexpr = 0x7FFFFFFFFFFFFFFF
    o_m = tl.arange(0, METRIC_BLOCK)
    o_p = tl.arange(0, PARTIAL_BLOCK)[None, :]
    m_metric = o_m < NUM_METRICS
    m_row = o_p < num_programs
    m_block = m_metric[:, None] & m_row
    p_block = p_scratch + o_m[:, None] * PARTIAL_BLOCK + o_p
    b_sums = tl.load(p_block, mask=m_row, other=0).to(tl.float64, bitcast=True)
    p_block += METRIC_BLOCK * PARTIAL_BLOCK
    b_squares = tl.load(p_block, mask=m_block, other=0).to(tl.float64, bitcast=True)
    p_block += NUM_METRICS * PARTIAL_BLOCK
    b_peaks = tl.load(p_block, mask=m_block, other=NO_PEAK).to(tl.float64, bitcast=True)
    p_block += NUM_METRICS * PARTIAL_BLOCK
    sums, squares = tl.sum(b_sums, axis=1), tl.sum(b_squares, axis=1)
    peak = tl.max(b_peaks, axis=1)
    # The earliest token that attains the peak.
    where = tl.min(tl.load(p_block, m_block & (b_peaks == peak[:, None]), other=LAST), axis=1)

    p_moments += o_m
    maxima = tl.load(p_moments + 2 * NUM_METRICS, mask=m_metric, other=float("-inf"))
    sums_before = tl.load(p_moments, mask=m_metric, other=0.0)
    squares_before = tl.load(p_moments + NUM_METRICS, mask=m_metric, other=0.0)
    # The tallies: an index per metric, the two counts, and the number of tokens seen before.
    tallies = tl.load(p_tallies + o_m)
    num_seen = tl.load(p_tallies + METRIC_BLOCK)
    argmax = tl.where(peak > maxima, where + num_seen, tallies)
    counts = tallies + tl.where(m_metric, 0.0, sums).to(tl.int64)

    tl.debug_barrier()  # the state is read by all threads before one of them replaces it
    tl.store(p_moments, sums_before + sums, mask=m_metric)
    tl.store(p_moments + NUM_METRICS, squares_before + squares, mask=m_metric)
    tl.store(p_moments + 2 * NUM_METRICS, tl.maximum(maxima, peak), mask=m_metric)
    tl.store(p_tallies + o_m, tl.where(m_metric, argmax, counts))
    tl.store(p_tallies + METRIC_BLOCK, num_seen + num_tokens)


def join_partials(
    moments: Tensor, tallies: Tensor, scratch: Tensor, num_programs: int, num_tokens: int
) -> None:
    """Add the partial states of `num_programs` programs, `num_tokens` tokens in all."""
    _join_partials_kernel[(1,)](
        moments,
        tallies,
        scratch,
        num_programs,
        num_tokens,
        NUM_METRICS=NUM_METRICS,
        METRIC_BLOCK=METRIC_BLOCK,
        PARTIAL_BLOCK=PARTIAL_BLOCK,
        **launch_options(JOIN_THREADS),
    )
