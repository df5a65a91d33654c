"""The sums of one token's pairs of hidden states, 4 x 4 pairs at a time, and its norms.

Of a pair with d = h_j - h_i: sum d^2 and sum |d| from the differences themselves, never from norms
and products. A thread adds at most 16 terms in float32, all of them positive, and 7 more additions
join the threads, before a sum is widened to float64: it is off by at most 23 * 2^-24 of itself,
typically by 1e-8. The norms are summed in float64.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_row(
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
    b_y0 = load_row(tl.load(p_after), o_h, hidden_size, ELEMENT, VALUE, THREADS, ENTRIES)
    a_y1 = tl.load(p_after + min(1, num_after - 1))
    b_y1 = load_row(a_y1, o_h, hidden_size, ELEMENT, VALUE, THREADS, ENTRIES)
    a_y2 = tl.load(p_after + min(2, num_after - 1))
    b_y2 = load_row(a_y2, o_h, hidden_size, ELEMENT, VALUE, THREADS, ENTRIES)
    a_y3 = tl.load(p_after + min(3, num_after - 1))
    b_y3 = load_row(a_y3, o_h, hidden_size, ELEMENT, VALUE, THREADS, ENTRIES)
    b_x0 = load_row(tl.load(p_before), o_h, hidden_size, ELEMENT, VALUE, THREADS, ENTRIES)
    a_x1 = tl.load(p_before + min(1, num_before - 1))
    b_x1 = load_row(a_x1, o_h, hidden_size, ELEMENT, VALUE, THREADS, ENTRIES)
    a_x2 = tl.load(p_before + min(2, num_before - 1))
    b_x2 = load_row(a_x2, o_h, hidden_size, ELEMENT, VALUE, THREADS, ENTRIES)
    a_x3 = tl.load(p_before + min(3, num_before - 1))
    b_x3 = load_row(a_x3, o_h, hidden_size, ELEMENT, VALUE, THREADS, ENTRIES)
    first = _four_pairs(b_x0, b_y0, b_y1, b_y2, b_y3)
    second = _four_pairs(b_x1, b_y0, b_y1, b_y2, b_y3)
    third = _four_pairs(b_x2, b_y0, b_y1, b_y2, b_y3)
    fourth = _four_pairs(b_x3, b_y0, b_y1, b_y2, b_y3)
    return tl.join(tl.join(first, third), tl.join(second, fourth))


@triton.jit
def measure_slice(
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
            b_row = load_row(address, o_h, hidden_size, ELEMENT, tl.float64, THREADS, ENTRIES)
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
