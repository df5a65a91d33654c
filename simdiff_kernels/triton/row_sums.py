"""Row sums in Triton: one read of both hidden states, 32 bytes written per token.

For a layer with input x, output y and d = y - x: sum x^2, sum y^2, sum d^2 and sum |d| over the
hidden dimension (`simdiff_kernels.reference.row_sums` is the specification). Bytes moved per token:
2 * hidden_size * element size read, 32 written; a token that is masked is not read. Memory is the
limit.

Data path: global memory -> shared memory, one step of all rows of a program, the copies of
stages - 2 others on their way (cp.async, Triton's pipeline) -> registers, a tile of float32 sums of
which each thread holds a few, x^2, x d, d^2 and |d| -> widened and joined over lanes once per
`MAX_TERMS` terms, in float64 -> sum y^2 and the trust test -> for a program with a row that fails
it the same once more in float64, for those rows alone -> 32 bytes of each token. A program is a
CTA (a block of threads); names begin with what they are: `i_` an index, `o_` offsets, `m_` a mask,
`p_` pointers, `b_` a tile of values.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..trust import LARGEST_SHORT, MOST_CANCELLED, SHORTEST_AFTER, SMALLEST_SHORT
from .launch import launch

SMALLEST = tl.constexpr(SMALLEST_SHORT)
LARGEST = tl.constexpr(LARGEST_SHORT)
SHORTEST = tl.constexpr(SHORTEST_AFTER)
CANCELLED = tl.constexpr(MOST_CANCELLED)

# (bytes of a row up to, rows of a program, lanes that share a row, stages).
#
# Bytes in flight: to read at full bandwidth a multiprocessor must wait for bandwidth * latency,
# 4.6 TB/s * 700 ns / 132 = 24 KB on an H200. While one step is summed, stages - 2 others are on
# their way, of 4 KB in a program of 128 threads: 24 KB with 8 stages, so that one program is enough
# where tokens are few; with 28 KB of shared memory five (A100) to seven (H100) are resident.
#
# Rows of up to 2 KB: the reduction over lanes costs as much as three vectors, and 8 lanes need
# three rounds for four rows at a time where 32 need five for one. Measured in CUDA on an H200, as
# a share of a pure read, 8 and 32 lanes: 0.89 and 0.80 (8192 x 576 bfloat16), 0.87 and 0.87
# (8192 x 2048), 0.64 and 0.87 (2048 x 4096). Rows of over 64 KB: 128 lanes, for a warp alone would
# need 15 us for one of them.
CONFIGURATIONS = (
    (2048, 16, 8, 8),
    (65536, 4, 32, 8),
    (1 << 62, 1, 128, 8),
)
THREADS = 128  # of a program
# Added in float32, one after the other, before three more additions join what a lane holds and the
# sum is widened: as few as in csrc/cpu. Steps of a row: 9 at 576 bfloat16, 16 at 4096, 32 at 8192.
MAX_TERMS = tl.constexpr(32)
_GRID = 1 << 30  # programs along the first axis of the grid


class Configuration(NamedTuple):
    """How a program walks over its rows; rows * lanes = `THREADS`."""

    rows: int
    """Rows of a program."""
    lanes: int
    """Threads that share a row."""
    vectors: int
    """Loads of each input that a thread issues in one step."""
    entries: int
    """Entries per load: 16 bytes where all rows start at multiples of 16 bytes, else one."""
    stages: int
    """Of the pipeline: one step is summed, the copies of stages - 2 others are on their way."""


# Rows of which nothing is known are read entry by entry; of 2 bytes they cannot be copied ahead.
UNALIGNED = Configuration(rows=1, lanes=128, vectors=4, entries=1, stages=4)


@cache
def configuration(hidden_size: int, element_size: int, aligned: bool) -> Configuration:
    """The table's row for states of this size."""
    if not aligned:
        return UNALIGNED
    row_bytes = hidden_size * element_size
    rows, lanes, stages = next(row[1:] for row in CONFIGURATIONS if row_bytes <= row[0])
    return Configuration(rows, lanes, 1, 16 // element_size, stages)


@triton.jit
def _over_lanes(b_sum, LANES: tl.constexpr, VECTORS: tl.constexpr, ENTRIES: tl.constexpr):
    """The sum of each row, (ROWS,), in float64; before that each lane adds what it holds."""
    b_lanes = tl.reshape(b_sum, (b_sum.shape[0], VECTORS, LANES, ENTRIES))
    return tl.sum(tl.sum(tl.sum(b_lanes, axis=3), axis=1).to(tl.float64), axis=1)


@triton.jit
def _sums(
    p_x,
    p_y,
    m_row,
    hidden_size,
    LANES: tl.constexpr,
    VECTORS: tl.constexpr,
    ENTRIES: tl.constexpr,
    STAGES: tl.constexpr,
    SHORT: tl.constexpr,
):
    """Per row: sum x^2, sum d^2, sum |d|, and sum x d from short sums, sum y^2 from float64."""
    TYPE: tl.constexpr = tl.float32 if SHORT else tl.float64
    ROWS: tl.constexpr = m_row.shape[0]
    STEP: tl.constexpr = LANES * VECTORS * ENTRIES
    PART: tl.constexpr = STEP * MAX_TERMS
    o_h = tl.arange(0, STEP)[None, :]
    xx = tl.zeros((ROWS,), tl.float64)
    dd = tl.zeros((ROWS,), tl.float64)
    ad = tl.zeros((ROWS,), tl.float64)
    other = tl.zeros((ROWS,), tl.float64)
    for i_part in range(0, hidden_size, PART):
        b_xx = tl.zeros((ROWS, STEP), TYPE)
        b_dd = tl.zeros((ROWS, STEP), TYPE)
        b_ad = tl.zeros((ROWS, STEP), TYPE)
        b_other = tl.zeros((ROWS, STEP), TYPE)
        end = tl.minimum(i_part + PART, hidden_size)
        for i_h in tl.range(i_part, end, STEP, num_stages=STAGES):
            m_tile = m_row[:, None] & (i_h + o_h < hidden_size)
            b_x = tl.load(p_x[:, None] + (i_h + o_h), mask=m_tile, other=0.0).to(TYPE)
            b_y = tl.load(p_y[:, None] + (i_h + o_h), mask=m_tile, other=0.0).to(TYPE)
            b_d = b_y - b_x
            b_xx += b_x * b_x
            b_dd += b_d * b_d
            b_ad += tl.abs(b_d)
            b_other += b_x * b_d if SHORT else b_y * b_y
        xx += _over_lanes(b_xx, LANES, VECTORS, ENTRIES)
        dd += _over_lanes(b_dd, LANES, VECTORS, ENTRIES)
        ad += _over_lanes(b_ad, LANES, VECTORS, ENTRIES)
        other += _over_lanes(b_other, LANES, VECTORS, ENTRIES)
    return xx, dd, ad, other


@triton.jit
def _float32_is_enough(xx, xd, dd, ad):
    """Whether short sums give metrics off by some 1e-7: `reference.float32_is_enough`.

    In float32, of which only the thresholds feel the rounding: 25 operations a token in float64
    are too many where it runs at 1/64 of float32.
    """
    x, d = xx.to(tl.float32), dd.to(tl.float32)
    gap = (2 * xd + dd).to(tl.float32)  # y - x, without cancellation
    y = x + gap
    # Constants stand on the right: the interpreter of Triton 3.7 and 3.8 multiplies no other way.
    m_range = (x > SMALLEST) & (x < LARGEST) & (y > x * SHORTEST) & (y < LARGEST) & (d < LARGEST)
    m_equal = (dd == 0) & (ad == 0)
    m_turned = (d >= SMALLEST) & (gap * (gap / (x + y)) <= d * CANCELLED)
    return m_range & (m_equal | m_turned)


# Nothing is specialised on values: `launch` looks a compiled kernel up by types and constants.
_ARGUMENTS = (
    "p_sums",
    "p_before",
    "p_after",
    "p_mask",
    "num_tokens",
    "inner",
    "hidden_size",
    "before_outer_stride",
    "before_inner_stride",
    "after_outer_stride",
    "after_inner_stride",
)


@triton.jit(do_not_specialize=_ARGUMENTS)
def _row_sums_kernel(
    p_sums,
    p_before,
    p_after,
    p_mask,
    num_tokens: tl.int64,
    inner: tl.int64,
    hidden_size: tl.int32,
    before_outer_stride: tl.int64,
    before_inner_stride: tl.int64,
    after_outer_stride: tl.int64,
    after_inner_stride: tl.int64,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    VECTORS: tl.constexpr,
    ENTRIES: tl.constexpr,
    STAGES: tl.constexpr,
    NESTED: tl.constexpr,
):
    """Each program sums `ROWS` rows, in float64 again if that is needed for one of them."""
    i_program = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    o_token = i_program * ROWS + tl.arange(0, ROWS)
    m_token = o_token < num_tokens
    m_read = m_token
    if p_mask is not None:
        m_read &= tl.load(p_mask + o_token, mask=m_token, other=0) != 0
    o_before, o_after = o_token * before_inner_stride, o_token * after_inner_stride
    if NESTED:
        i_outer = o_token // inner
        o_before += i_outer * (before_outer_stride - inner * before_inner_stride)
        o_after += i_outer * (after_outer_stride - inner * after_inner_stride)
    if ENTRIES > 1:  # a whole number of vectors, which start at multiples of 16 bytes
        hidden_size = hidden_size // ENTRIES * ENTRIES
    p_x = tl.multiple_of(p_before + o_before, 16 if ENTRIES > 1 else 1)
    p_y = tl.multiple_of(p_after + o_after, 16 if ENTRIES > 1 else 1)

    if p_before.dtype.element_ty == tl.float64:
        xx, dd, ad, yy = _sums(
            p_x, p_y, m_read, hidden_size, LANES, VECTORS, ENTRIES, STAGES, False
        )
    else:
        xx, dd, ad, xd = _sums(p_x, p_y, m_read, hidden_size, LANES, VECTORS, ENTRIES, STAGES, True)
        yy = xx + (2 * xd + dd)
        m_again = m_read & ~_float32_is_enough(xx, xd, dd, ad)
        if tl.max(m_again.to(tl.int32), axis=0) > 0:
            xx64, dd64, ad64, yy64 = _sums(p_x, p_y, m_again, hidden_size, LANES, 1, 1, 1, False)
            xx, yy = tl.where(m_again, xx64, xx), tl.where(m_again, yy64, yy)
            dd, ad = tl.where(m_again, dd64, dd), tl.where(m_again, ad64, ad)

    b_sums = tl.reshape(tl.join(tl.join(xx, dd), tl.join(yy, ad)), (ROWS, 4))
    o_sums = o_token[:, None] * 4 + tl.arange(0, 4)[None, :]
    tl.store(p_sums + o_sums, b_sums, mask=m_token[:, None])


def rows_are_aligned(before: Tensor, after: Tensor) -> bool:
    """Whether every row starts and ends at a multiple of 16 bytes."""
    x, y = before.stride(), after.stride()
    numbers = (before.shape[2] | x[0] | x[1] | y[0] | y[1]) * before.element_size()
    return (numbers | before.data_ptr() | after.data_ptr()) % 16 == 0


def row_sums(sums: Tensor, before: Tensor, after: Tensor, mask: Tensor | None = None) -> None:
    """`simdiff_kernels.reference.row_sums` on the current stream, one launch.

    Args:
        sums: float64 `(outer, inner, 4)`, contiguous.
        before, after: hidden states, the last dimension contiguous.
        mask: bool `(outer, inner)`, contiguous.
    """
    outer, inner, hidden_size = before.shape
    num_tokens = outer * inner
    if num_tokens == 0:
        return
    strides = *before.stride()[:2], *after.stride()[:2]
    # Sequences that follow each other like tokens need no division.
    nested = outer > 1 and (strides[0] != inner * strides[1] or strides[2] != inner * strides[3])
    row = configuration(hidden_size, before.element_size(), rows_are_aligned(before, after))
    programs = -(-num_tokens // row.rows)
    launch(
        _row_sums_kernel,
        (min(programs, _GRID), -(-programs // _GRID), 1),
        (sums, before, after, mask, num_tokens, inner, hidden_size, *strides),
        (*row, nested),
        (before.dtype, None if mask is None else mask.dtype),
        THREADS,
    )
