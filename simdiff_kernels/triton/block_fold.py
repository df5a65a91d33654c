"""From the sums of one token's pairs of hidden states to metrics, added to those of its program.

A pair whose sums in float32 are not enough is summed again in float64 (csrc/common/pair_sums.h has
the same test). The angular distance is csrc/common/angular_distance.h: the polynomial, its
coefficients and its error bound of 6e-16 stand there.
"""

from __future__ import annotations

import triton
import triton.language as tl

from simdiff_kernels.triton.block_partials import pair_states
from simdiff_kernels.triton.block_tiles import load_row

ANGLE_COEFFICIENTS = (
    0.450158158078553,
    0.03751317983990453,
    0.00844046546131523,
    0.0025120434041018313,
    0.0008547900587793906,
    0.0003147518162554873,
    0.00012176560885061421,
    5.08856774840461e-05,
    1.246856348271973e-05,
    3.416325600515887e-05,
    -5.8616029883050776e-05,
    0.000115507363395217,
    -0.0001550564393358059,
    0.0001575707409999391,
    -0.00011390069203360194,
    5.649559627774413e-05,
    -1.715654052948501e-05,
    2.484236376984012e-06,
)
_ANGLE_COEFFICIENTS = tl.constexpr(ANGLE_COEFFICIENTS)


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
        b_x = load_row(row_before, o_h, hidden_size, ELEMENT, tl.float64, THREADS, ENTRIES)
        b_y = load_row(row_after, o_h, hidden_size, ELEMENT, tl.float64, THREADS, ENTRIES)
        d = b_y - b_x
        squared += tl.sum(d * d, axis=1)
        absolute += tl.sum(tl.abs(d), axis=1)
        growth += tl.sum(d * (b_x + b_y), axis=1)
    return tl.sum(squared, axis=0), tl.sum(absolute, axis=0), tl.sum(growth, axis=0)


@triton.jit
def _sums_suffice(dd, ad, gap, both_norms, both_norms_squared, WIDE: tl.constexpr):
    """Whether errors of some 1e-8 in the sums make errors of some 1e-7 in the metrics.

    Sums far from the ends of what they were formed in, states so far apart that the difference of
    their norms is as exact as their difference is, and no small difference of large numbers in the
    cosine distance v nor in 2 - v, on both of which the angle depends.
    """
    SMALLEST: tl.constexpr = 1e-300 if WIDE else 1e-24
    LARGEST: tl.constexpr = 1e300 if WIDE else 1e30
    NEAREST: tl.constexpr = 1e-2 if WIDE else 1e-10
    equal = (dd == 0) & (ad == 0)
    in_range = (dd >= SMALLEST) & (dd < LARGEST)
    turned = (gap * gap <= 0.9375 * dd) & (dd <= 0.9375 * (both_norms * both_norms))
    return equal | (in_range & (dd >= NEAREST * both_norms_squared) & turned)


@triton.jit
def _angular_distance(v):
    """arccos(1 - v) / pi of float64 cosine distances: sqrt(m) times a polynomial in m.

    m = min(v, 2 - v), and the angle of v > 1 is one minus that of 2 - v.
    """
    m = tl.minimum(v, 2.0 - v)
    square = m * m
    even = square * _ANGLE_COEFFICIENTS[16] + _ANGLE_COEFFICIENTS[14]
    odd = square * _ANGLE_COEFFICIENTS[17] + _ANGLE_COEFFICIENTS[15]
    for k in tl.static_range(12, -1, -2):
        even = even * square + _ANGLE_COEFFICIENTS[k]
        odd = odd * square + _ANGLE_COEFFICIENTS[k + 1]
    near = tl.sqrt(m) * (odd * m + even)
    return tl.where(v > 1, 1.0 - near, near)


@triton.jit
def _add(p_sums, o_pair, value, m_pair, pairs, row):
    tl.store(p_sums + row * pairs + o_pair, tl.load(p_sums + row * pairs + o_pair, m_pair) + value,
             m_pair)  # fmt: skip


@triton.jit
def fold_token(
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
        m_inexact = m_pair & ~_sums_suffice(dd, ad, gap, a + b, aa + bb, WIDE)
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
        angle = _angular_distance(cosine)
        _add(p_sums, o_pair, cosine, m_pair, pairs, 0)
        _add(p_sums, o_pair, dd, m_pair, pairs, 1)
        _add(p_sums, o_pair, absolute_difference, m_pair, pairs, 2)
        _add(p_sums, o_pair, relative, m_pair, pairs, 3)
        _add(p_sums, o_pair, angle, m_pair, pairs, 4)
        _add(p_sums, o_pair, cosine * cosine, m_pair, pairs, NUM_METRICS)
        _add(p_sums, o_pair, dd * dd, m_pair, pairs, NUM_METRICS + 1)
        _add(p_sums, o_pair, absolute_difference * absolute_difference, m_pair, pairs,
             NUM_METRICS + 2)  # fmt: skip
        _add(p_sums, o_pair, relative * relative, m_pair, pairs, NUM_METRICS + 3)
        _add(p_sums, o_pair, angle * angle, m_pair, pairs, NUM_METRICS + 4)
        p_peak = p_sums + 2 * NUM_METRICS * pairs + o_pair
        tl.store(p_peak, tl.maximum(tl.load(p_peak, m_pair, other=0.0), dd), m_pair)
