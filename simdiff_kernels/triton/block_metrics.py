"""All blocks of layers in Triton: every pair of a token's hidden states, 4 x 4 pairs at a time.

For hidden states h_0 ... h_L of a token and every pair i < j with d = h_j - h_i: sum d^2 and
sum |d| from the differences themselves, from which with the norms all metrics follow
(`simdiff_kernels.reference` is the specification). A thread adds at most 16 terms in float32, all
of them positive, and 7 more additions join the threads, before a sum is widened to float64: it is
off by at most 23 * 2^-24 of itself, typically by 1e-8. A pair for which that is not enough is
summed again in float64. The norms are summed in float64.

Bytes moved per token: (L + 1) * hidden_size * element size read. A program measures a token slice
by slice, 4 KB of each row, so that the other pairs of a slice find their rows in the cache; it
keeps 1408 bytes for each tile of 4 x 4 pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from simdiff_kernels.metrics import BLOCK_METRICS
from simdiff_kernels.triton.block_partials import (
    describe_states,
    join_programs,
    max_programs,
    pair_states,
    program_words,
    scratch_words,
)
from simdiff_kernels.triton.configurations import THREADS, WARP_SIZE, launch_options
from simdiff_kernels.triton.layer_metrics import _device

__all__ = ["accumulate_blocks", "scratch_words"]

SHORT_TERMS = 16  # that a thread adds in float32
FOLD_BLOCK = 128  # pairs folded together
# By element size: 4 x 4 pairs and the entries of 8 rows take up to 160 (Triton 3.9, sm_80 and
# sm_90), with which three programs share a multiprocessor; left to itself ptxas aims for fewer and
# spills some. Sums of float64 states take twice as many.
MAX_REGISTERS = {2: 168, 4: 168, 8: 255}
ELEMENTS = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


@triton.jit
def _load_row(
    address, o_h, hidden_size, ELEMENT: tl.constexpr, VALUE: tl.constexpr, THREADS: tl.constexpr,
    ENTRIES: tl.constexpr,
):  # fmt: skip
    """Entries `o_h` of the row at an address, `(THREADS, ENTRIES)`."""
    p_row = address.to(tl.pointer_type(ELEMENT))
    if ENTRIES > 1:  # rows are known to start at multiples of 16 bytes
        p_row = tl.multiple_of(p_row, 16)
    b_row = tl.load(p_row + o_h, mask=o_h < hidden_size, other=0.0)
    return tl.reshape(b_row, (THREADS, ENTRIES)).to(VALUE)


@triton.jit
def _pair(b_x, b_y):
    """Sum d^2 and sum |d| of a thread's entries, `(THREADS, 2)`."""
    d = b_y - b_x
    return tl.join(tl.sum(d * d, axis=1), tl.sum(tl.abs(d), axis=1))


# A join adds a last axis, so that the axes of a tile are: the sum, the after state's number in two
# binary digits, the before state's in two. All stay within a thread.
@triton.jit
def _four_pairs(b_x, b_y0, b_y1, b_y2, b_y3):
    even = tl.join(_pair(b_x, b_y0), _pair(b_x, b_y2))
    odd = tl.join(_pair(b_x, b_y1), _pair(b_x, b_y3))
    return tl.join(even, odd)


@triton.jit
def _tile_step(
    p_before, p_after, num_before, num_after, o_h, hidden_size, ELEMENT: tl.constexpr,
    VALUE: tl.constexpr, THREADS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """What entries `o_h` add to a tile, `(THREADS, 2, 2, 2, 2, 2)`.

    `p_before` and `p_after` point at the addresses of four rows each, of which the numbers exist;
    for others the last one is read.
    """
    b_y0 = _load_row(tl.load(p_after), o_h, hidden_size, ELEMENT, VALUE, THREADS, ENTRIES)
    a_y1 = tl.load(p_after + min(1, num_after - 1))
    b_y1 = _load_row(a_y1, o_h, hidden_size, ELEMENT, VALUE, THREADS, ENTRIES)
    a_y2 = tl.load(p_after + min(2, num_after - 1))
    b_y2 = _load_row(a_y2, o_h, hidden_size, ELEMENT, VALUE, THREADS, ENTRIES)
    a_y3 = tl.load(p_after + min(3, num_after - 1))
    b_y3 = _load_row(a_y3, o_h, hidden_size, ELEMENT, VALUE, THREADS, ENTRIES)
    b_x0 = _load_row(tl.load(p_before), o_h, hidden_size, ELEMENT, VALUE, THREADS, ENTRIES)
    a_x1 = tl.load(p_before + min(1, num_before - 1))
    b_x1 = _load_row(a_x1, o_h, hidden_size, ELEMENT, VALUE, THREADS, ENTRIES)
    a_x2 = tl.load(p_before + min(2, num_before - 1))
    b_x2 = _load_row(a_x2, o_h, hidden_size, ELEMENT, VALUE, THREADS, ENTRIES)
    a_x3 = tl.load(p_before + min(3, num_before - 1))
    b_x3 = _load_row(a_x3, o_h, hidden_size, ELEMENT, VALUE, THREADS, ENTRIES)
    first = _four_pairs(b_x0, b_y0, b_y1, b_y2, b_y3)
    second = _four_pairs(b_x1, b_y0, b_y1, b_y2, b_y3)
    third = _four_pairs(b_x2, b_y0, b_y1, b_y2, b_y3)
    fourth = _four_pairs(b_x3, b_y0, b_y1, b_y2, b_y3)
    return tl.join(tl.join(first, third), tl.join(second, fourth))


@triton.jit
def _measure_slice(
    p_rows, p_token, norms_squared, num_states, begin, hidden_size, ELEMENT: tl.constexpr,
    VALUE: tl.constexpr, THREADS: tl.constexpr, ENTRIES: tl.constexpr, SLICE: tl.constexpr,
    STATE_BLOCK: tl.constexpr,
):  # fmt: skip
    """Add a slice of all rows to the tiles of the token; the norms with this slice."""
    end = min(begin + SLICE, hidden_size)
    o_entry = tl.arange(0, THREADS * ENTRIES)
    o_state = tl.arange(0, STATE_BLOCK)
    for state in range(num_states):
        squares = tl.zeros((THREADS,), tl.float64)
        address = tl.load(p_rows + state)
        for i_h in range(begin, end, THREADS * ENTRIES):
            o_h = i_h + o_entry
            b_row = _load_row(address, o_h, hidden_size, ELEMENT, tl.float64, THREADS, ENTRIES)
            squares += tl.sum(b_row * b_row, axis=1)
        norms_squared += tl.where(o_state == state, tl.sum(squares, axis=0), 0.0)
    o_sum = tl.arange(0, 32)
    p_tile = p_token + o_sum
    for after in range(0, num_states, 4):
        for before in range(0, after + 4, 4):
            # Read before the barriers of the sum below, after which one thread replaces it.
            earlier = tl.zeros((32,), tl.float64)
            if begin > 0:
                earlier = tl.load(p_tile)
            sums = tl.zeros((THREADS, 2, 2, 2, 2, 2), VALUE)
            for i_h in range(begin, end, THREADS * ENTRIES):
                sums += _tile_step(
                    p_rows + before,
                    p_rows + after,
                    num_states - before,
                    num_states - after,
                    i_h + o_entry,
                    hidden_size,
                    ELEMENT,
                    VALUE,
                    THREADS,
                    ENTRIES,
                )
            of_tile = tl.sum(tl.reshape(sums, (THREADS, 32)), axis=0).to(tl.float64)
            tl.store(p_tile, earlier + of_tile)
            p_tile += 32
    return norms_squared


@triton.jit
def _exact_pair(
    row_before, row_after, hidden_size, ELEMENT: tl.constexpr, THREADS: tl.constexpr,
    ENTRIES: tl.constexpr,
):  # fmt: skip
    """Sum d^2, sum |d| and sum d (x + y) in float64, of which the last is |y|^2 - |x|^2."""
    squared = tl.zeros((THREADS,), tl.float64)
    absolute = tl.zeros((THREADS,), tl.float64)
    growth = tl.zeros((THREADS,), tl.float64)
    for i_h in range(0, hidden_size, THREADS * ENTRIES):
        o_h = i_h + tl.arange(0, THREADS * ENTRIES)
        b_x = _load_row(row_before, o_h, hidden_size, ELEMENT, tl.float64, THREADS, ENTRIES)
        b_y = _load_row(row_after, o_h, hidden_size, ELEMENT, tl.float64, THREADS, ENTRIES)
        d = b_y - b_x
        squared += tl.sum(d * d, axis=1)
        absolute += tl.sum(tl.abs(d), axis=1)
        growth += tl.sum(d * (b_x + b_y), axis=1)
    return tl.sum(squared, axis=0), tl.sum(absolute, axis=0), tl.sum(growth, axis=0)


@triton.jit
def _sums_suffice(dd, ad, gap, both_norms_squared, WIDE: tl.constexpr):
    """Whether errors of some 1e-8 in the sums make errors of some 1e-7 in the metrics.

    Sums far from the ends of what they were formed in, states so far apart that the difference of
    their norms is as exact as their difference is, and no small difference of large numbers.
    """
    SMALLEST: tl.constexpr = 1e-300 if WIDE else 1e-24
    LARGEST: tl.constexpr = 1e300 if WIDE else 1e30
    equal = (dd == 0) & (ad == 0)
    in_range = (dd >= SMALLEST) & (dd < LARGEST)
    return equal | (in_range & (dd >= 1e-10 * both_norms_squared) & (gap * gap <= 0.9375 * dd))


@triton.jit
def _add(p_sums, o_pair, value, m_pair, pairs, row):
    tl.store(p_sums + row * pairs + o_pair, tl.load(p_sums + row * pairs + o_pair, m_pair) + value,
             m_pair)  # fmt: skip


@triton.jit
def _fold_token(
    p_rows, p_norms, p_token, p_sums, num_states, pairs, hidden_size, ELEMENT: tl.constexpr,
    WIDE: tl.constexpr, THREADS: tl.constexpr, ENTRIES: tl.constexpr, FOLD_BLOCK: tl.constexpr,
    NUM_METRICS: tl.constexpr,
):  # fmt: skip
    """Turn the sums of a finite token into metrics and add these to the program's."""
    for first in range(0, pairs, FOLD_BLOCK):
        o_pair = first + tl.arange(0, FOLD_BLOCK)
        i, j = pair_states(o_pair)
        m_pair = (i < j) & (j < num_states) & (o_pair < pairs)
        p_pair = p_token + o_pair // 16 * 32 + o_pair % 16
        dd, ad = tl.load(p_pair, m_pair, other=0.0), tl.load(p_pair + 16, m_pair, other=0.0)
        aa, bb = tl.load(p_norms + i, m_pair, other=1.0), tl.load(p_norms + j, m_pair, other=1.0)
        a, b = tl.sqrt(aa), tl.sqrt(bb)
        gap = b - a
        m_inexact = m_pair & ~_sums_suffice(dd, ad, gap, aa + bb, WIDE)
        inexact = tl.min(tl.where(m_inexact, o_pair, pairs), axis=0)
        while inexact < pairs:
            m_this = o_pair == inexact
            row_before = tl.load(p_rows + tl.sum(tl.where(m_this, i, 0), axis=0))
            row_after = tl.load(p_rows + tl.sum(tl.where(m_this, j, 0), axis=0))
            squared, absolute, growth = _exact_pair(
                row_before, row_after, hidden_size, ELEMENT, THREADS, ENTRIES
            )
            dd, ad = tl.where(m_this, squared, dd), tl.where(m_this, absolute, ad)
            gap = tl.where(m_this, growth / tl.where(a + b == 0, 1.0, a + b), gap)
            m_inexact &= ~m_this
            inexact = tl.min(tl.where(m_inexact, o_pair, pairs), axis=0)

        # 1 - cos = (||d||^2 - (b - a)^2) / (2 a b); a zero vector has a result by definition.
        cosine = (dd - gap * gap) / tl.where(a * b == 0, 1.0, 2 * a * b)
        cosine = tl.where(cosine < 0, 0.0, tl.where(cosine > 2, 2.0, cosine))
        cosine = tl.where(a * b == 0, tl.where(a == b, 0.0, 1.0), cosine)
        relative = tl.sqrt(dd) / tl.where(a == 0, 1.0, a)
        relative = tl.where(a == 0, tl.where(dd == 0, 0.0, 1.0), relative)
        absolute_difference = ad / hidden_size
        _add(p_sums, o_pair, cosine, m_pair, pairs, 0)
        _add(p_sums, o_pair, dd, m_pair, pairs, 1)
        _add(p_sums, o_pair, absolute_difference, m_pair, pairs, 2)
        _add(p_sums, o_pair, relative, m_pair, pairs, 3)
        _add(p_sums, o_pair, cosine * cosine, m_pair, pairs, NUM_METRICS)
        _add(p_sums, o_pair, dd * dd, m_pair, pairs, NUM_METRICS + 1)
        _add(p_sums, o_pair, absolute_difference * absolute_difference, m_pair, pairs,
             NUM_METRICS + 2)  # fmt: skip
        _add(p_sums, o_pair, relative * relative, m_pair, pairs, NUM_METRICS + 3)
        p_peak = p_sums + 2 * NUM_METRICS * pairs + o_pair
        tl.store(p_peak, tl.maximum(tl.load(p_peak, m_pair, other=0.0), dd), m_pair)


_CHANGING = ["num_tokens", "inner", "num_states", "tokens_per_program", "words_per_program"]


@triton.jit(do_not_specialize=_CHANGING)
def _block_metrics_kernel(
    p_table,
    p_programs,
    p_mask,
    num_tokens,
    inner,
    num_states,
    hidden_size,
    tokens_per_program,
    words_per_program,
    ELEMENT: tl.constexpr,
    ELEMENT_BYTES: tl.constexpr,
    THREADS: tl.constexpr,
    ENTRIES: tl.constexpr,
    SLICE: tl.constexpr,
    STATE_BLOCK: tl.constexpr,
    FOLD_BLOCK: tl.constexpr,
    NUM_METRICS: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    """Each program measures `tokens_per_program` tokens in order; its words of the scratch memory.

    Addresses of the token's rows, their norms, two counts, the sums of pairs, the token's tiles.
    """
    WIDE: tl.constexpr = ELEMENT_BYTES == 8
    VALUE: tl.constexpr = tl.float64 if WIDE else tl.float32
    i_program = tl.program_id(0).to(tl.int64)
    num_groups = (num_states + 3) // 4
    pairs = num_groups * (num_groups + 1) * 8
    p_rows = p_programs + i_program * words_per_program
    p_norms = (p_rows + num_states).to(tl.pointer_type(tl.float64))
    p_counts = p_rows + 2 * num_states
    p_sums = (p_counts + 2).to(tl.pointer_type(tl.float64))
    p_token = p_sums + (2 * NUM_METRICS + 1) * pairs
    o_state = tl.arange(0, STATE_BLOCK)
    m_state = o_state < num_states
    for first in range(0, (2 * NUM_METRICS + 1) * pairs, FOLD_BLOCK):
        o_sum = first + tl.arange(0, FOLD_BLOCK)
        tl.store(p_sums + o_sum, 0.0, o_sum < (2 * NUM_METRICS + 1) * pairs)
    num_used = i_program * 0
    num_nonfinite = i_program * 0
    first_token = i_program * tokens_per_program
    for i_token in range(first_token, min(first_token + tokens_per_program, num_tokens)):
        counted = True
        if HAS_MASK:
            counted = tl.load(p_mask + i_token) != 0
        if counted:  # padding is not even read
            i_outer, i_inner = i_token // inner, i_token % inner
            p_state = p_table + 3 * o_state
            address = tl.load(p_state, m_state, other=0)
            outer_stride = tl.load(p_state + 1, m_state, other=0)
            inner_stride = tl.load(p_state + 2, m_state, other=0)
            offset = (i_outer * outer_stride + i_inner * inner_stride) * ELEMENT_BYTES
            tl.debug_barrier()  # nobody reads of the token before any more
            tl.store(p_rows + o_state, address + offset, m_state)
            tl.debug_barrier()
            norms_squared = tl.zeros((STATE_BLOCK,), tl.float64)
            for begin in range(0, hidden_size, SLICE):
                norms_squared = _measure_slice(
                    p_rows, p_token, norms_squared, num_states, begin, hidden_size, ELEMENT,
                    VALUE, THREADS, ENTRIES, SLICE, STATE_BLOCK,
                )  # fmt: skip
            # A NaN or Inf in a row reaches its sum of squares; Inf and NaN alone fail this.
            infinite = tl.sum(tl.where(norms_squared < float("inf"), 0, 1), axis=0)
            tl.store(p_norms + o_state, norms_squared, m_state)
            tl.debug_barrier()  # norms and tiles are read by other threads than wrote them
            if infinite == 0:
                _fold_token(
                    p_rows, p_norms, p_token, p_sums, num_states, pairs, hidden_size, ELEMENT,
                    WIDE, THREADS, ENTRIES, FOLD_BLOCK, NUM_METRICS,
                )  # fmt: skip
                num_used += 1
            else:
                num_nonfinite += 1
    tl.store(p_counts, num_used)
    tl.store(p_counts + 1, num_nonfinite)


class Walk(NamedTuple):
    """How a program walks over the rows."""

    entries: int
    """Of a row, per load and thread: 16 bytes where rows are known to be aligned, else one."""
    slice_size: int
    """Entries of a row whose pairs are all measured before it goes on."""


def walk_over(element_size: int, aligned: bool) -> Walk:
    """How rows of this element size are walked over."""
    # No more entries for a thread than SHORT_TERMS; float64 has no such limit.
    return Walk(16 // element_size if aligned else 1, SHORT_TERMS * THREADS)


def block_launch_options(element_size: int, warp_size: int = WARP_SIZE) -> dict[str, int | bool]:
    """Triton's options for the main kernel; AMD's compiler takes no number of registers."""
    options = launch_options(THREADS, warp_size)
    return options if warp_size == 64 else {**options, "maxnreg": MAX_REGISTERS[element_size]}


def _rows_are_aligned(states: Sequence[Tensor]) -> bool:
    """Addresses, sizes and strides that are multiples of 16."""
    numbers = [states[0].shape[2]]
    for state in states:
        numbers += [state.data_ptr(), state.stride(0), state.stride(1)]
    return all(number % 16 == 0 for number in numbers)


def accumulate_blocks(
    moments: Tensor,
    tallies: Tensor,
    states: Sequence[Tensor],
    mask: Tensor | None,
    scratch: Tensor | None = None,
) -> None:
    """`simdiff_kernels.reference.accumulate_blocks` on the current stream.

    One launch for each eight states, which describes them to the kernel, and two more. `scratch`,
    int64 with at least `scratch_words(L + 1)` entries of any value, holds the partial sums; calls
    that share one must be on one stream. Without it one is allocated.

    Raises:
        ValueError: `scratch` is too small.
    """
    first, num_states = states[0], len(states)
    outer, inner, hidden_size = first.shape
    if outer * inner == 0:
        return
    wanted = scratch_words(num_states)
    if scratch is None:
        scratch = first.new_empty(wanted, dtype=torch.int64)
    elif scratch.numel() < wanted:
        raise ValueError(
            f"accumulate_blocks: scratch must have at least {wanted} entries for {num_states} "
            f"states, got {scratch.numel()}"
        )
    tokens_per_program = triton.cdiv(outer * inner, max_programs(num_states))
    num_programs = triton.cdiv(outer * inner, tokens_per_program)
    walk = walk_over(first.element_size(), _rows_are_aligned(states))
    table, programs = scratch[: 3 * num_states], scratch[3 * num_states :]
    with _device(first):
        describe_states(table, states)
        _block_metrics_kernel[(num_programs,)](
            table,
            programs,
            mask,
            outer * inner,
            inner,
            num_states,
            hidden_size,
            tokens_per_program,
            program_words(num_states),
            ELEMENT=ELEMENTS[first.dtype],
            ELEMENT_BYTES=first.element_size(),
            THREADS=THREADS,
            ENTRIES=walk.entries,
            SLICE=walk.slice_size,
            STATE_BLOCK=triton.next_power_of_2(num_states),
            FOLD_BLOCK=FOLD_BLOCK,
            NUM_METRICS=len(BLOCK_METRICS),
            HAS_MASK=mask is not None,
            **block_launch_options(first.element_size()),
        )
        join_programs(moments, tallies, programs, num_states, num_programs, outer * inner)
