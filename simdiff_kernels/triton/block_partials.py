"""What surrounds the main kernel of all blocks: its table of states, its scratch memory, its end.

A program's words: addresses and norms of the current token's rows, two counts, the sums of all
pairs (sums, sums of squares, maximum), the tiles of the current token.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from simdiff_kernels.metrics import BLOCK_METRICS
from simdiff_kernels.triton.configurations import THREADS, launch_options

NUM_METRICS = len(BLOCK_METRICS)
PAIRS = 16  # of a tile: four states before, four after
STATES_PER_LAUNCH = 8
# Three programs of 128 threads and up to 168 registers on each of an H100's 132 multiprocessors.
_MAX_PROGRAMS, _MIN_PROGRAMS = 396, 132
_SCRATCH_BYTES = 64 << 20  # with more than about 50 states fewer programs share it
JOIN_PROGRAMS = JOIN_PAIRS = 32
DESCRIBE_THREADS = 64  # a warp of AMD


def num_tiles(num_states: int) -> int:
    """Tiles of 4 x 4 pairs on and above the diagonal."""
    groups = triton.cdiv(num_states, 4)
    return groups * (groups + 1) // 2


def program_words(num_states: int) -> int:
    """int64 words of one program."""
    return 2 * num_states + 2 + num_tiles(num_states) * PAIRS * (2 * NUM_METRICS + 1 + 2)


def max_programs(num_states: int) -> int:
    """How many programs share the tokens; it depends on the size alone, as the order of sums."""
    fitting = _SCRATCH_BYTES // (8 * program_words(num_states))
    return min(_MAX_PROGRAMS, max(_MIN_PROGRAMS, fitting))


def scratch_words(num_states: int) -> int:
    """int64 words that an update of all blocks needs."""
    return 3 * num_states + max_programs(num_states) * program_words(num_states)


# The numbers of states and tokens, and addresses, change: specialised on, kernels would be compiled
# again.
@triton.jit
def pair_states(o_pair):
    """The states i and j of numbered pairs: tiles along the columns of the triangle."""
    tile, number = o_pair // 16, o_pair % 16
    column = ((tl.sqrt((8 * tile + 1).to(tl.float64)) - 1) * 0.5).to(tl.int32)
    row = tile - column * (column + 1) // 2
    return 4 * row + number % 4, 4 * column + number // 4


_NUMBERS = [
    f"{name}{k}" for k in range(STATES_PER_LAUNCH) for name in ("address", "outer", "inner")
]


@triton.jit(do_not_specialize=["count", *_NUMBERS])
def _describe_states_kernel(
    p_table, count, address0, outer0, inner0, address1, outer1, inner1, address2, outer2, inner2,
    address3, outer3, inner3, address4, outer4, inner4, address5, outer5, inner5, address6,
    outer6, inner6, address7, outer7, inner7,
):  # fmt: skip
    """Write addresses and strides of the first `count` of eight states to the table."""
    _describe(p_table, 0, count, address0, outer0, inner0)
    _describe(p_table, 1, count, address1, outer1, inner1)
    _describe(p_table, 2, count, address2, outer2, inner2)
    _describe(p_table, 3, count, address3, outer3, inner3)
    _describe(p_table, 4, count, address4, outer4, inner4)
    _describe(p_table, 5, count, address5, outer5, inner5)
    _describe(p_table, 6, count, address6, outer6, inner6)
    _describe(p_table, 7, count, address7, outer7, inner7)


@triton.jit
def _describe(p_table, state: tl.constexpr, count, address, outer_stride, inner_stride):
    m_exists = state < count
    tl.store(p_table + 3 * state, address, m_exists)
    tl.store(p_table + 3 * state + 1, outer_stride, m_exists)
    tl.store(p_table + 3 * state + 2, inner_stride, m_exists)


def describe_states(table: Tensor, states: Sequence[Tensor]) -> None:
    """Fill the table `(num_states, 3)` of addresses and strides, on the device.

    As arguments of kernels: a copy from the host would wait for it, or could not be captured.
    """
    for first in range(0, len(states), STATES_PER_LAUNCH):
        some = states[first : first + STATES_PER_LAUNCH]
        numbers = [n for h in some for n in (h.data_ptr(), h.stride(0), h.stride(1))]
        numbers += [0] * (3 * STATES_PER_LAUNCH - len(numbers))
        _describe_states_kernel[(1,)](
            table[3 * first :], len(some), *numbers, **launch_options(DESCRIBE_THREADS)
        )


@triton.jit(do_not_specialize=["num_programs", "words_per_program", "num_tokens", "num_states"])
def _join_programs_kernel(
    p_moments,
    p_tallies,
    p_programs,
    num_programs,
    words_per_program,
    num_tokens,
    num_states,
    NUM_METRICS: tl.constexpr,
    JOIN_PROGRAMS: tl.constexpr,
    JOIN_PAIRS: tl.constexpr,
):
    """Each program adds the partial sums of some pairs to the state, always in the same order."""
    num_groups = (num_states + 3) // 4
    pairs = num_groups * (num_groups + 1) * 8
    o_pair = tl.program_id(0) * JOIN_PAIRS + tl.arange(0, JOIN_PAIRS)
    i, j = pair_states(o_pair)
    m_pair = (i < j) & (j < num_states) & (o_pair < pairs)
    o_program = tl.arange(0, JOIN_PROGRAMS).to(tl.int64)[:, None]
    p_sums = (p_programs + 2 * num_states + 2).to(tl.pointer_type(tl.float64)) + o_pair[None, :]
    p_moment = p_moments + i.to(tl.int64) * num_states + j
    for m in tl.static_range(2 * NUM_METRICS + 1):
        sums = tl.zeros((JOIN_PROGRAMS, JOIN_PAIRS), tl.float64)
        for first in range(0, num_programs, JOIN_PROGRAMS):
            p_some = p_sums + (first + o_program) * words_per_program + m * pairs
            m_some = (first + o_program < num_programs) & m_pair[None, :]
            b_sums = tl.load(p_some, m_some, other=0.0)
            sums = tl.maximum(sums, b_sums) if m == 2 * NUM_METRICS else sums + b_sums
        earlier = tl.load(p_moment, m_pair, other=0.0)
        tl.debug_barrier()  # the state is read by all threads before one of them replaces it
        if m == 2 * NUM_METRICS:
            tl.store(p_moment, tl.maximum(earlier, tl.max(sums, axis=0)), m_pair)
        else:
            tl.store(p_moment, earlier + tl.sum(sums, axis=0), m_pair)
        p_moment += num_states.to(tl.int64) * num_states
    if tl.program_id(0) == 0:
        counts = tl.zeros((JOIN_PROGRAMS, 2), tl.int64)
        o_count = tl.arange(0, 2)
        p_counts = p_programs + 2 * num_states + o_count[None, :]
        for first in range(0, num_programs, JOIN_PROGRAMS):
            m_some = first + o_program < num_programs
            counts += tl.load(p_counts + (first + o_program) * words_per_program, m_some, other=0)
        p_tally = p_tallies + o_count
        tallies, num_seen = tl.load(p_tally), tl.load(p_tallies + 2)
        tl.debug_barrier()
        tl.store(p_tally, tallies + tl.sum(counts, axis=0))
        tl.store(p_tallies + 2, num_seen + num_tokens)


def join_programs(
    moments: Tensor,
    tallies: Tensor,
    programs: Tensor,
    num_states: int,
    num_programs: int,
    num_tokens: int,
) -> None:
    """Add the partial sums of `num_programs` programs, `num_tokens` tokens in all, to the state."""
    grid = (triton.cdiv(num_tiles(num_states) * PAIRS, JOIN_PAIRS),)
    _join_programs_kernel[grid](
        moments,
        tallies,
        programs,
        num_programs,
        program_words(num_states),
        num_tokens,
        num_states,
        NUM_METRICS=NUM_METRICS,
        JOIN_PROGRAMS=JOIN_PROGRAMS,
        JOIN_PAIRS=JOIN_PAIRS,
        **launch_options(THREADS),
    )
