"""Both operators in Triton: one read of each hidden state, sums in float64.

For a layer with input x, output y and d = y - x, per token (`simdiff_kernels.reference` is the
specification): sum x^2, sum y^2, sum d^2 and sum |d| over the hidden dimension, from which all
metrics follow. Bytes moved per token: 2 * hidden_size * element size read; 24 written by
`token_metrics`, none by `accumulate`, whose partial states are 208 bytes for each of at most
`_MAX_PROGRAMS` programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from simdiff_kernels.metrics import METRICS, result_dtype

_NUM_METRICS = len(METRICS)
# The metric axis of a block: Triton's block sizes are powers of two.
_METRIC_BLOCK = 8
_PARTIAL_BLOCK = 64
# Enough to fill every multiprocessor of an H100 (132) several times over; with it the partial
# states stay below 1 MB however many tokens there are.
_MAX_PROGRAMS = 4096
SCRATCH_WORDS = 0

# (hidden_size up to, tokens per tile, hidden entries per step, warps). A step is 1024 entries: with
# 128 threads one 128-bit load of each bfloat16 input per thread, so that sums of few groups stay
# live and registers leave room for the occupancy that hides the loads. Compiled sizes are in
# tests/test_triton_compile.py; times on a GPU are not measured yet.
_CONFIGURATIONS = (
    (1024, 2, 512, 4),
    (1 << 62, 1, 1024, 4),
)


@triton.jit
def _block_metrics(
    p_before,
    p_after,
    o_before,
    o_after,
    m_token,
    hidden_size,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUP: tl.constexpr,
    METRIC_BLOCK: tl.constexpr,
):
    """Metrics (BLOCK_T, METRIC_BLOCK) of a tile of rows, and whether each row is finite."""
    # Sums per group of GROUP neighbours, which one thread loads at once: adding them up right away
    # takes no exchange between threads and keeps a group's sums in one register pair each. GROUP
    # is 1 for rows that are not loaded so: a group spread over threads would be summed by each of
    # them, with a fused multiply-add in a different place, and to different last bits.
    GROUPS: tl.constexpr = BLOCK_H // GROUP
    b_xx = tl.zeros((BLOCK_T, GROUPS), tl.float64)
    b_yy = tl.zeros((BLOCK_T, GROUPS), tl.float64)
    b_dd = tl.zeros((BLOCK_T, GROUPS), tl.float64)
    b_ad = tl.zeros((BLOCK_T, GROUPS), tl.float64)
    for i_h in range(0, hidden_size, BLOCK_H):
        o_h = i_h + tl.arange(0, BLOCK_H)
        m_block = m_token[:, None] & (o_h < hidden_size)[None, :]
        b_x = tl.load(p_before + o_before[:, None] + o_h[None, :], mask=m_block, other=0.0)
        b_y = tl.load(p_after + o_after[:, None] + o_h[None, :], mask=m_block, other=0.0)
        b_x = tl.reshape(b_x.to(tl.float64), (BLOCK_T, GROUPS, GROUP))
        b_y = tl.reshape(b_y.to(tl.float64), (BLOCK_T, GROUPS, GROUP))
        b_d = b_y - b_x
        b_xx += tl.sum(b_x * b_x, axis=2)
        b_yy += tl.sum(b_y * b_y, axis=2)
        b_dd += tl.sum(b_d * b_d, axis=2)
        b_ad += tl.sum(tl.abs(b_d), axis=2)
    xx, yy = tl.sum(b_xx, axis=1), tl.sum(b_yy, axis=1)
    dd, ad = tl.sum(b_dd, axis=1), tl.sum(b_ad, axis=1)
    a, b = tl.sqrt(xx), tl.sqrt(yy)

    # 1 - cos = (||d||^2 - (b - a)^2) / (2 a b); where a zero vector leaves it undefined the
    # divisors are replaced by one, so that no NaN is made on the way.
    zero = a * b == 0
    gap = (yy - xx) / tl.where(a + b == 0, 1.0, a + b)
    cosine = (dd - gap * gap) / tl.where(zero, 1.0, 2 * a * b)
    cosine = tl.where(cosine < 0, 0.0, tl.where(cosine > 2, 2.0, cosine))
    cosine = tl.where(zero, tl.where(a == b, 0.0, 1.0), cosine)
    relative = tl.sqrt(dd) / tl.where(a == 0, 1.0, a)
    relative = tl.where(a == 0, tl.where(dd == 0, 0.0, 1.0), relative)

    o_m = tl.arange(0, METRIC_BLOCK)[None, :]
    b_metrics = tl.where(o_m == 0, cosine[:, None], 0.0)
    b_metrics = tl.where(o_m == 1, dd[:, None], b_metrics)
    b_metrics = tl.where(o_m == 2, (ad / hidden_size)[:, None], b_metrics)
    b_metrics = tl.where(o_m == 3, relative[:, None], b_metrics)
    b_metrics = tl.where(o_m == 4, a[:, None], b_metrics)
    b_metrics = tl.where(o_m == 5, b[:, None], b_metrics)
    # A NaN or Inf in a row reaches its sum of squares; Inf and NaN alone fail this comparison.
    m_finite = xx + yy < float("inf")
    return b_metrics, m_finite


@triton.jit
def _layer_metrics_kernel(
    p_before,
    p_after,
    p_mask,
    p_per_token,
    p_partial_moments,
    p_partial_tallies,
    num_tokens,
    inner,
    hidden_size,
    before_outer_stride,
    before_inner_stride,
    after_outer_stride,
    after_inner_stride,
    tiles_per_program,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUP: tl.constexpr,
    NUM_METRICS: tl.constexpr,
    METRIC_BLOCK: tl.constexpr,
    HAS_MASK: tl.constexpr,
    STORE_TOKENS: tl.constexpr,
    REDUCE: tl.constexpr,
):
    """Each program measures `tiles_per_program` tiles in order and stores its partial state."""
    i_program = tl.program_id(0).to(tl.int64)
    o_m = tl.arange(0, METRIC_BLOCK)
    m_metric = o_m < NUM_METRICS
    sums = tl.zeros((METRIC_BLOCK,), tl.float64)
    squares = tl.zeros((METRIC_BLOCK,), tl.float64)
    maxima = tl.full((METRIC_BLOCK,), float("-inf"), tl.float64)
    argmax = tl.full((METRIC_BLOCK,), -1, tl.int64)
    num_used = tl.full((), 0, tl.int64)
    num_nonfinite = tl.full((), 0, tl.int64)

    for i_tile in range(tiles_per_program):
        first = (i_program * tiles_per_program + i_tile) * BLOCK_T
        o_token = first + tl.arange(0, BLOCK_T).to(tl.int64)
        m_token = o_token < num_tokens
        i_outer, i_inner = o_token // inner, o_token % inner
        m_counted = m_token
        if HAS_MASK:
            m_counted &= tl.load(p_mask + o_token, mask=m_token, other=0) != 0
        b_metrics, m_finite = _block_metrics(
            p_before,
            p_after,
            i_outer * before_outer_stride + i_inner * before_inner_stride,
            i_outer * after_outer_stride + i_inner * after_inner_stride,
            m_token if STORE_TOKENS else m_counted,  # padding is read only where it is stored
            hidden_size,
            BLOCK_T,
            BLOCK_H,
            GROUP,
            METRIC_BLOCK,
        )
        if STORE_TOKENS:
            o_out = o_m[None, :].to(tl.int64) * num_tokens + o_token[:, None]
            m_out = m_token[:, None] & m_metric[None, :]
            tl.store(p_per_token + o_out, b_metrics, mask=m_out)
        if REDUCE:
            m_used = (m_counted & m_finite)[:, None]
            b_used = tl.where(m_used, b_metrics, 0.0)
            b_peaks = tl.where(m_used, b_metrics, float("-inf"))
            sums += tl.sum(b_used, axis=0)
            squares += tl.sum(b_used * b_used, axis=0)
            peak = tl.max(b_peaks, axis=0)
            # The earliest token that attains the peak.
            at_peak = m_used & (b_peaks == peak[None, :])
            where = tl.min(tl.where(at_peak, o_token[:, None], 0x7FFFFFFFFFFFFFFF), axis=0)
            argmax = tl.where(peak > maxima, where, argmax)
            maxima = tl.maximum(maxima, peak)
            num_used += tl.sum((m_counted & m_finite).to(tl.int64), axis=0)
            num_nonfinite += tl.sum((m_counted & ~m_finite).to(tl.int64), axis=0)

    if REDUCE:
        p_moments = p_partial_moments + i_program * 3 * METRIC_BLOCK + o_m
        tl.store(p_moments, sums)
        tl.store(p_moments + METRIC_BLOCK, squares)
        tl.store(p_moments + 2 * METRIC_BLOCK, maxima)
        p_tallies = p_partial_tallies + i_program * 2 * METRIC_BLOCK + o_m
        tl.store(p_tallies, argmax)
        counts = tl.where(o_m == 0, num_used, tl.where(o_m == 1, num_nonfinite, 0))
        tl.store(p_tallies + METRIC_BLOCK, counts)


@triton.jit
def _join_partials_kernel(
    p_moments,
    p_tallies,
    p_partial_moments,
    p_partial_tallies,
    num_programs,
    num_tokens,
    NUM_METRICS: tl.constexpr,
    METRIC_BLOCK: tl.constexpr,
    PARTIAL_BLOCK: tl.constexpr,
):
    """One program adds all partial states to the running state, always in the same order."""
    o_m = tl.arange(0, METRIC_BLOCK)
    m_metric = o_m < NUM_METRICS
    num_seen = tl.load(p_tallies + NUM_METRICS + 2)
    sums = tl.load(p_moments + o_m, mask=m_metric, other=0.0)
    squares = tl.load(p_moments + NUM_METRICS + o_m, mask=m_metric, other=0.0)
    maxima = tl.load(p_moments + 2 * NUM_METRICS + o_m, mask=m_metric, other=float("-inf"))
    argmax = tl.load(p_tallies + o_m, mask=m_metric, other=-1)
    counts = tl.load(p_tallies + NUM_METRICS + o_m, mask=o_m < 2, other=0)

    for i_first in range(0, num_programs, PARTIAL_BLOCK):
        o_p = (i_first + tl.arange(0, PARTIAL_BLOCK)).to(tl.int64)
        m_p = (o_p < num_programs)[:, None]
        p_block = p_partial_moments + o_p[:, None] * 3 * METRIC_BLOCK + o_m[None, :]
        sums += tl.sum(tl.load(p_block, mask=m_p, other=0.0), axis=0)
        squares += tl.sum(tl.load(p_block + METRIC_BLOCK, mask=m_p, other=0.0), axis=0)
        b_peaks = tl.load(p_block + 2 * METRIC_BLOCK, mask=m_p, other=float("-inf"))
        p_block = p_partial_tallies + o_p[:, None] * 2 * METRIC_BLOCK + o_m[None, :]
        b_where = tl.load(p_block, mask=m_p, other=-1)
        counts += tl.sum(tl.load(p_block + METRIC_BLOCK, mask=m_p, other=0), axis=0)
        peak = tl.max(b_peaks, axis=0)
        at_peak = m_p & (b_peaks == peak[None, :]) & (b_where >= 0)
        where = tl.min(tl.where(at_peak, b_where, 0x7FFFFFFFFFFFFFFF), axis=0)
        argmax = tl.where(peak > maxima, where + num_seen, argmax)
        maxima = tl.maximum(maxima, peak)

    tl.debug_barrier()  # num_seen is read by all threads before one of them replaces it
    tl.store(p_moments + o_m, sums, mask=m_metric)
    tl.store(p_moments + NUM_METRICS + o_m, squares, mask=m_metric)
    tl.store(p_moments + 2 * NUM_METRICS + o_m, maxima, mask=m_metric)
    tl.store(p_tallies + o_m, argmax, mask=m_metric)
    tl.store(p_tallies + NUM_METRICS + o_m, counts, mask=o_m < 2)
    tl.store(p_tallies + NUM_METRICS + 2, num_seen + num_tokens)


def configuration(hidden_size: int) -> tuple[int, int, int]:
    """(tokens per tile, hidden entries per step, warps) for a hidden size."""
    return next(row[1:] for row in _CONFIGURATIONS if hidden_size <= row[0])


def group_size(element_size: int, aligned: bool) -> int:
    """Entries that one thread loads at once: 16 bytes of rows known to be aligned to them."""
    return 16 // element_size if aligned else 1


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
    partials: tuple[Tensor, Tensor] | None,
    num_programs: int,
) -> None:
    outer, inner, hidden_size = before.shape
    block_t, block_h, num_warps = configuration(hidden_size)
    num_tiles = triton.cdiv(outer * inner, block_t)
    partial_moments, partial_tallies = partials or (None, None)
    _layer_metrics_kernel[(num_programs,)](
        before,
        after,
        mask,
        per_token,
        partial_moments,
        partial_tallies,
        outer * inner,
        inner,
        hidden_size,
        before.stride(0),
        before.stride(1),
        after.stride(0),
        after.stride(1),
        triton.cdiv(num_tiles, num_programs),
        BLOCK_T=block_t,
        BLOCK_H=block_h,
        GROUP=group_size(before.element_size(), _rows_are_aligned(before, after)),
        NUM_METRICS=_NUM_METRICS,
        METRIC_BLOCK=_METRIC_BLOCK,
        HAS_MASK=mask is not None,
        STORE_TOKENS=per_token is not None,
        REDUCE=partials is not None,
        num_warps=num_warps,
    )


def _num_programs(before: Tensor) -> int:
    block_t, _, _ = configuration(before.shape[2])
    num_tiles = triton.cdiv(before.shape[0] * before.shape[1], block_t)
    return triton.cdiv(num_tiles, triton.cdiv(num_tiles, _MAX_PROGRAMS))


def token_metrics(before: Tensor, after: Tensor) -> Tensor:
    """`simdiff_kernels.reference.token_metrics` on the current stream, one launch."""
    outer, inner, _ = before.shape
    out = before.new_empty((_NUM_METRICS, outer, inner), dtype=result_dtype(before.dtype))
    if outer * inner:
        with _device(before):
            # Nothing is carried between tiles here, so each gets a program of its own.
            block_t, _, _ = configuration(before.shape[2])
            _launch(before, after, None, out, None, triton.cdiv(outer * inner, block_t))
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
    """`simdiff_kernels.reference.accumulate` on the current stream, two launches."""
    num_tokens = before.shape[0] * before.shape[1]
    if num_tokens == 0:
        return
    num_programs = _num_programs(before)
    with _device(before):
        partials = (
            before.new_empty((num_programs, 3, _METRIC_BLOCK), dtype=torch.float64),
            before.new_empty((num_programs, 2, _METRIC_BLOCK), dtype=torch.int64),
        )
        _launch(before, after, mask, per_token, partials, num_programs)
        _join_partials_kernel[(1,)](
            moments,
            tallies,
            *partials,
            num_programs,
            num_tokens,
            NUM_METRICS=_NUM_METRICS,
            METRIC_BLOCK=_METRIC_BLOCK,
            PARTIAL_BLOCK=_PARTIAL_BLOCK,
            num_warps=4,
        )


def _device(tensor: Tensor) -> torch.cuda.device:
    """Make the tensor's device current for the launch; does nothing for CPU tensors."""
    return torch.cuda.device(tensor.device if tensor.is_cuda else -1)
