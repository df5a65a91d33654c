"""All blocks of layers in Triton: every pair of a token's hidden states, 4 x 4 pairs at a time.

For hidden states h_0 ... h_L of a token and every pair i < j: the sums of block_tiles.py, from
which with the norms all metrics follow in block_fold.py (`simdiff_kernels.reference` is the
specification).

Bytes moved per token: (L + 1) * hidden_size * element size read. A program measures a token slice
by slice, 4 KB of each row, so that the other pairs of a slice find their rows in the cache; it
keeps 1664 bytes for each tile of 4 x 4 pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from simdiff_kernels.metrics import BLOCK_METRICS
from simdiff_kernels.triton.block_fold import fold_token
from simdiff_kernels.triton.block_partials import (
    describe_states,
    join_programs,
    max_programs,
    program_words,
    scratch_words,
)
from simdiff_kernels.triton.block_tiles import measure_slice
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
                norms_squared = measure_slice(
                    p_rows, p_token, norms_squared, num_states, begin, hidden_size, ELEMENT,
                    VALUE, THREADS, ENTRIES, SLICE, STATE_BLOCK,
                )  # fmt: skip
            # A NaN or Inf in a row reaches its sum of squares; Inf and NaN alone fail this.
            infinite = tl.sum(tl.where(norms_squared < float("inf"), 0, 1), axis=0)
            tl.store(p_norms + o_state, norms_squared, m_state)
            tl.debug_barrier()  # norms and tiles are read by other threads than wrote them
            if infinite == 0:
                fold_token(
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
