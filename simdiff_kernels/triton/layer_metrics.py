"""Both operators in Triton: one read of each hidden state, sums in float64.

For a layer with input x, output y and d = y - x, per token (`simdiff_kernels.reference` is the
specification): sum x^2, sum y^2, sum d^2 and sum |d| over the hidden dimension, from which all
metrics follow. Bytes moved per token: 2 * hidden_size * element size read; 24 written by
`token_metrics` (48 for float64 states), none by `accumulate`, whose programs, 1024 at most,
leave 208 bytes each (`partials`).
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from simdiff_kernels.metrics import result_dtype
from simdiff_kernels.triton.configurations import THREADS, configuration, launch_options
from simdiff_kernels.triton.partials import (
    METRIC_BLOCK,
    NUM_METRICS,
    PARTIAL_BLOCK,
    SCRATCH_WORDS,
    join_partials,
)

# `accumulate` runs as many programs as fit at once at 64 registers a thread (65536 on an NVIDIA
# multiprocessor): 864 on an A100 (108), 1024 on an H100 (132). With fewer, their loads would not
# cover the latency of the memory; those beyond would run alone when the others are done.
_PROGRAMS_PER_MULTIPROCESSOR = 8
_MAX_PROGRAMS = PARTIAL_BLOCK
_MAX_GRID = 2**31 - 1


@triton.jit
def _add_entries(xx, yy, dd, ad, b_x, b_y):
    """Add to each thread's four sums the entries that it holds, the last axis, one by one."""
    # tl.sum would first form all products and add them pairwise, 6.5 float64 instructions per
    # entry instead of the 5 here, three of them fused. An A100 has 16 of them per 4 bytes read.
    if b_x.shape[2] == 1:
        x = tl.reshape(b_x, (b_x.shape[0], b_x.shape[1])).to(tl.float64)
        y = tl.reshape(b_y, (b_y.shape[0], b_y.shape[1])).to(tl.float64)
        d = y - x
        return xx + x * x, yy + y * y, dd + d * d, ad + tl.abs(d)
    else:
        HALVES: tl.constexpr = (b_x.shape[0], b_x.shape[1], b_x.shape[2] // 2, 2)
        b_x_even, b_x_odd = tl.split(tl.reshape(b_x, HALVES))
        b_y_even, b_y_odd = tl.split(tl.reshape(b_y, HALVES))
        xx, yy, dd, ad = _add_entries(xx, yy, dd, ad, b_x_even, b_y_even)
        return _add_entries(xx, yy, dd, ad, b_x_odd, b_y_odd)


@triton.jit
def _add_vectors(
    xx,
    yy,
    dd,
    ad,
    p_x,
    p_y,
    m_token,
    o_h,
    hidden_size,
    THREADS: tl.constexpr,
    ENTRIES: tl.constexpr,
    VECTORS: tl.constexpr,
):
    """Load `VECTORS` blocks of each input, one behind the other, then add them to the sums."""
    m_block = m_token[:, None] & (o_h < hidden_size)
    b_x = tl.load(p_x + o_h, mask=m_block, other=0.0)
    b_y = tl.load(p_y + o_h, mask=m_block, other=0.0)
    if VECTORS > 1:  # their loads are issued before these are waited for
        o_next = o_h + THREADS * ENTRIES
        xx, yy, dd, ad = _add_vectors(
            xx, yy, dd, ad, p_x, p_y, m_token, o_next, hidden_size, THREADS, ENTRIES, VECTORS - 1
        )
    OF_THREAD: tl.constexpr = (b_x.shape[0], THREADS, ENTRIES)
    b_x, b_y = tl.reshape(b_x, OF_THREAD), tl.reshape(b_y, OF_THREAD)
    return _add_entries(xx, yy, dd, ad, b_x, b_y)


@triton.jit
def _row_sums(
    p_before,
    p_after,
    o_before,
    o_after,
    m_token,
    hidden_size,
    TOKENS: tl.constexpr,
    VECTORS: tl.constexpr,
    THREADS: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Per row of a tile: sum x^2, sum y^2, sum d^2, sum |d|, each of shape (TOKENS,)."""
    p_x = p_before + o_before[:, None]
    p_y = p_after + o_after[:, None]
    o_h = tl.arange(0, THREADS * ENTRIES)[None, :]
    xx = tl.zeros((TOKENS, THREADS), tl.float64)
    yy = tl.zeros((TOKENS, THREADS), tl.float64)
    dd = tl.zeros((TOKENS, THREADS), tl.float64)
    ad = tl.zeros((TOKENS, THREADS), tl.float64)
    for i_h in range(0, hidden_size, VECTORS * THREADS * ENTRIES):
        xx, yy, dd, ad = _add_vectors(
            xx, yy, dd, ad, p_x, p_y, m_token, i_h + o_h, hidden_size, THREADS, ENTRIES, VECTORS
        )
    return tl.sum(xx, axis=1), tl.sum(yy, axis=1), tl.sum(dd, axis=1), tl.sum(ad, axis=1)


@triton.jit
def _metrics(xx, yy, dd, ad, hidden_size, METRIC_BLOCK: tl.constexpr):
    """Metrics (TOKENS, METRIC_BLOCK) from the sums, each the quotient of its column."""
    # 1 - cos = (||d||^2 - (b - a)^2) / (2 a b), b - a = (b^2 - a^2) / (a + b)
    a, b = tl.sqrt(xx), tl.sqrt(yy)
    gap = (yy - xx) / tl.where(a + b == 0, 1.0, a + b)
    o_m = tl.arange(0, METRIC_BLOCK)[None, :]
    above = tl.where(o_m == 0, (dd - gap * gap)[:, None], dd[:, None])
    above = tl.where(o_m == 2, ad[:, None], above)
    above = tl.where(o_m == 3, tl.sqrt(dd)[:, None], above)
    above = tl.where(o_m == 4, a[:, None], above)
    above = tl.where(o_m == 5, b[:, None], above)
    below = tl.where(o_m == 0, (2 * a * b)[:, None], 1.0)
    below = tl.where(o_m == 2, hidden_size, below)
    below = tl.where(o_m == 3, a[:, None], below)

    m_zero = below == 0  # a zero vector: the metrics are 0 or 1 by definition, no NaN is made
    quotient = above / tl.where(m_zero, 1.0, below)
    quotient = tl.where((o_m == 0) & (quotient < 0), 0.0, quotient)
    quotient = tl.where((o_m == 0) & (quotient > 2), 2.0, quotient)
    m_changed = tl.where(o_m == 0, (a != b)[:, None], (dd != 0)[:, None])
    return tl.where(m_zero, tl.where(m_changed, 1.0, 0.0), quotient)


# Token counts change from batch to batch: specialised on their divisibility, the kernel would be
# compiled again.
@triton.jit(do_not_specialize=["num_tokens", "inner", "tiles_per_program"])
def _layer_metrics_kernel(
    p_before,
    p_after,
    p_mask,
    p_per_token,
    p_scratch,
    num_tokens,
    inner,
    hidden_size,
    before_outer_stride,
    before_inner_stride,
    after_outer_stride,
    after_inner_stride,
    tiles_per_program,
    TOKENS: tl.constexpr,
    VECTORS: tl.constexpr,
    THREADS: tl.constexpr,
    ENTRIES: tl.constexpr,
    NUM_METRICS: tl.constexpr,
    METRIC_BLOCK: tl.constexpr,
    PARTIAL_BLOCK: tl.constexpr,
    HAS_MASK: tl.constexpr,
    STORE_TOKENS: tl.constexpr,
    REDUCE: tl.constexpr,
):
    """Each program measures `tiles_per_program` tiles in order and stores its partial state."""
    i_program = tl.program_id(0).to(tl.int64)
    o_m = tl.arange(0, METRIC_BLOCK)[None, :]
    # One state per row of a tile, joined at the end: rows of different warps need no exchange.
    sums = tl.zeros((TOKENS, METRIC_BLOCK), tl.float64)
    squares = tl.zeros((TOKENS, METRIC_BLOCK), tl.float64)
    maxima = tl.full((TOKENS, METRIC_BLOCK), float("-inf"), tl.float64)
    i_peak = tl.full((TOKENS, METRIC_BLOCK), -1, tl.int32)  # the tile of the maximum

    for i_tile in range(tiles_per_program):
        first = (i_program * tiles_per_program + i_tile) * TOKENS
        o_token = first + tl.arange(0, TOKENS)
        m_token = o_token < num_tokens
        i_outer, i_inner = o_token // inner, o_token % inner
        m_counted = m_token
        if HAS_MASK:
            m_counted &= tl.load(p_mask + o_token, mask=m_token, other=0) != 0
        xx, yy, dd, ad = _row_sums(
            p_before,
            p_after,
            i_outer * before_outer_stride + i_inner * before_inner_stride,
            i_outer * after_outer_stride + i_inner * after_inner_stride,
            m_token if STORE_TOKENS else m_counted,  # padding is read only where it is stored
            hidden_size,
            TOKENS,
            VECTORS,
            THREADS,
            ENTRIES,
        )
        b_metrics = _metrics(xx, yy, dd, ad, hidden_size, METRIC_BLOCK)
        if STORE_TOKENS:
            o_out = o_m.to(tl.int64) * num_tokens + o_token[:, None]
            m_out = m_token[:, None] & (o_m < NUM_METRICS)
            tl.store(p_per_token + o_out, b_metrics, mask=m_out)
        if REDUCE:
            # A NaN or Inf in a row reaches its sum of squares; Inf and NaN alone fail this.
            m_finite = xx + yy < float("inf")
            m_used = (m_counted & m_finite)[:, None]
            m_nonfinite = (m_counted & ~m_finite)[:, None]
            m_one = tl.where(o_m == NUM_METRICS, m_used, m_nonfinite)
            b_counts = tl.where(m_one, 1.0, 0.0)
            b_used = tl.where(m_used, b_metrics, 0.0)
            sums += tl.where(o_m < NUM_METRICS, b_used, b_counts)
            squares += b_used * b_used
            m_higher = m_used & (b_metrics > maxima)
            maxima = tl.where(m_higher, b_metrics, maxima)
            i_peak = tl.where(m_higher, i_tile, i_peak)

    if REDUCE:
        peak = tl.max(maxima, axis=0)
        m_peak = (maxima == peak[None, :]) & (i_peak >= 0)
        o_peak = (i_program * tiles_per_program + i_peak) * TOKENS + tl.arange(0, TOKENS)[:, None]
        where = tl.min(tl.where(m_peak, o_peak, 0x7FFFFFFFFFFFFFFF), axis=0)
        o_m = tl.arange(0, METRIC_BLOCK)
        m_metric = o_m < NUM_METRICS
        p_column = p_scratch + o_m * PARTIAL_BLOCK + i_program
        tl.store(p_column, tl.sum(sums, axis=0).to(tl.int64, bitcast=True))
        p_column += METRIC_BLOCK * PARTIAL_BLOCK
        tl.store(p_column, tl.sum(squares, axis=0).to(tl.int64, bitcast=True), mask=m_metric)
        p_column += NUM_METRICS * PARTIAL_BLOCK
        tl.store(p_column, peak.to(tl.int64, bitcast=True), mask=m_metric)
        p_column += NUM_METRICS * PARTIAL_BLOCK
        tl.store(p_column, where, mask=m_metric)


def _rows_are_aligned(before: Tensor, after: Tensor) -> bool:
    """What Triton specialises on: addresses, sizes and strides that are multiples of 16."""
    numbers = [before.shape[2]]
    for states in (before, after):
        numbers += [states.data_ptr(), states.stride(0), states.stride(1)]
    return all(number % 16 == 0 for number in numbers)


def _launch(
    before: Tensor,
    after: Tensor,
    mask: Tensor | None,
    per_token: Tensor | None,
    scratch: Tensor | None,
    max_programs: int,
) -> int:
    """Launch the main kernel; the number of programs."""
    outer, inner, hidden_size = before.shape
    aligned = _rows_are_aligned(before, after)
    row = configuration(hidden_size, before.element_size(), aligned)
    num_tiles = triton.cdiv(outer * inner, row.tokens)
    tiles_per_program = triton.cdiv(num_tiles, max_programs)
    num_programs = triton.cdiv(num_tiles, tiles_per_program)
    _layer_metrics_kernel[(num_programs,)](
        before,
        after,
        mask,
        per_token,
        scratch,
        outer * inner,
        inner,
        hidden_size,
        before.stride(0),
        before.stride(1),
        after.stride(0),
        after.stride(1),
        tiles_per_program,
        TOKENS=row.tokens,
        VECTORS=row.vectors,
        THREADS=row.threads,
        ENTRIES=row.entries,
        NUM_METRICS=NUM_METRICS,
        METRIC_BLOCK=METRIC_BLOCK,
        PARTIAL_BLOCK=PARTIAL_BLOCK,
        HAS_MASK=mask is not None,
        STORE_TOKENS=per_token is not None,
        REDUCE=scratch is not None,
        **launch_options(THREADS),
    )
    return num_programs


def token_metrics(before: Tensor, after: Tensor) -> Tensor:
    """`simdiff_kernels.reference.token_metrics` on the current stream, one launch."""
    outer, inner, _ = before.shape
    out = before.new_empty((NUM_METRICS, outer, inner), dtype=result_dtype(before.dtype))
    if outer * inner:
        with _device(before):
            # Nothing is carried from tile to tile here, so each gets a program of its own.
            _launch(before, after, None, out, None, _MAX_GRID)
    return out


def accumulate(
    moments: Tensor,
    tallies: Tensor,
    before: Tensor,
    after: Tensor,
    mask: Tensor | None,
    per_token: Tensor | None,
    scratch: Tensor | None = None,
) -> None:
    """`simdiff_kernels.reference.accumulate` on the current stream, two launches.

    `scratch`, int64 with at least `SCRATCH_WORDS` entries of any value, holds the partial states;
    calls that share one must be on one stream. Without it one is allocated.

    Raises:
        ValueError: `scratch` is too small.
    """
    num_tokens = before.shape[0] * before.shape[1]
    if num_tokens == 0:
        return
    if scratch is None:
        scratch = before.new_empty(SCRATCH_WORDS, dtype=torch.int64)
    elif scratch.numel() < SCRATCH_WORDS:
        raise ValueError(
            f"accumulate: scratch must have at least {SCRATCH_WORDS} entries, got {scratch.numel()}"
        )
    with _device(before):
        num_programs = _launch(before, after, mask, per_token, scratch, _resident_programs(before))
        join_partials(moments, tallies, scratch, num_programs, num_tokens)


def _resident_programs(states: Tensor) -> int:
    """How many programs of `accumulate` run at once where these states live."""
    if not states.is_cuda:
        return _MAX_PROGRAMS
    return min(_MAX_PROGRAMS, _PROGRAMS_PER_MULTIPROCESSOR * _multiprocessors(states.device))


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _device(tensor: Tensor) -> torch.cuda.device:
    """Make the tensor's device current for the launch; does nothing for CPU tensors."""
    return torch.cuda.device(tensor.device if tensor.is_cuda else -1)
