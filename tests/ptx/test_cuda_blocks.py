"""The CUDA kernels of accumulate_blocks as nvcc compiles them, executed without a GPU."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ptx import FaultError, Gpu, Report
from ptx.block_updates import BITS, check_state, some_states
from ptx.compilers import find_nvcc, nvcc_ptx
from simdiff_kernels import reference
from simdiff_kernels.blocks import empty_block_state
from simdiff_kernels.ops import as_rows
from simdiff_kernels.testing import BlockCase, block_cases, check_token_blocks, walk

pytestmark = pytest.mark.skipif(find_nvcc() is None, reason="nvcc is not installed")

CSRC = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
MANGLED = {
    torch.float32: "IfE",
    torch.float64: "IdE",
    torch.bfloat16: "NS0_8BFloat16E",
    torch.float16: "I6__halfE",
}
MAX_STATES, THREADS, SIDE = 160, 256, 4
TILE_WORDS = 7 * 32  # TileSums
# Sums of a few dozen terms in float32 (csrc/cuda/block_tiles.cuh): 37 additions at most.
SHORT = 37 / 4 * 2.0**-24


@cache
def compiled(arch: str) -> Gpu:
    """All kernels of block_metrics.cu for one architecture, parsed and bound once."""
    source = f'#include "{CSRC / "block_metrics.cu"}"\n'
    return Gpu(nvcc_ptx(source, arch, "-std=c++17", "-O3"))


def kernel_name(gpu: Gpu, *parts: str) -> str:
    (name,) = [name for name in gpu.programs if all(part in name for part in parts)]
    return name


@dataclass
class Run:
    """One update by hidden states `(outer, inner, hidden_size)`: both launches."""

    states: Sequence[Tensor]
    mask: Tensor | None = None
    tokens_per_block: int = 2
    slice_bytes: int = 256
    earlier: tuple[Tensor, Tensor] | None = None
    arch: str = "sm_80"
    moments: Tensor = field(init=False)
    tallies: Tensor = field(init=False)

    def __post_init__(self) -> None:
        state = self.earlier or empty_block_state(len(self.states) - 1, torch.device("cpu"))
        self.moments, self.tallies = (part.clone() for part in state)

    def launch(self) -> Report:
        """The report of the main kernel."""
        gpu = compiled(self.arch)
        gpu.memory = type(gpu.memory)()
        first, num_states = self.states[0], len(self.states)
        outer, inner, hidden_size = first.shape
        blocks = -(-outer * inner // self.tokens_per_block)
        groups = -(-num_states // SIDE)
        tiles = groups * (groups + 1) // 2
        self.buffers = [buffer_of(gpu, h, f"h_{k}") for k, h in enumerate(self.states)]
        partials = np.empty((blocks, tiles, TILE_WORDS))
        counts = np.empty((blocks, 2), np.int64)
        mask = self.mask
        pointers = [
            None if mask is None else gpu.buffer(mask.view(torch.uint8).numpy(), "mask"),
            gpu.buffer(self.moments.numpy(), "moments"),
            gpu.buffer(self.tallies.numpy(), "tallies"),
            gpu.buffer(partials, "partials", initialised=False),
            gpu.buffer(counts, "counts", initialised=False),
        ]
        numbers = [outer * inner, inner, self.tokens_per_block]
        sizes = [num_states, tiles, hidden_size, self.slice_bytes // first.element_size()]
        arguments = pack(self.buffers, self.states, pointers, numbers, sizes)
        main = kernel_name(gpu, "block_metrics_kernel", MANGLED[first.dtype])
        report = gpu.launch(main, blocks, THREADS, [arguments], num_states * self.slice_bytes)
        join = kernel_name(gpu, "join_blocks_kernel")
        joined = gpu.launch(join, tiles, THREADS, [arguments, blocks])
        assert joined.load_counts(pointers[3]).max() == 1, "a partial sum was joined twice"
        return report


def pack(buffers, states, pointers, numbers, sizes) -> bytes:
    """`Arguments` of block_metrics.cu."""
    rows = [(b.address, *h.stride()[:2]) for b, h in zip(buffers, states, strict=True)]
    flat = [number for row in rows for number in row] + [0] * 3 * (MAX_STATES - len(rows))
    addresses = [0 if p is None else p.address for p in pointers]
    return struct.pack(f"<{3 * MAX_STATES}q5Q3q4i", *flat, *addresses, *numbers, *sizes)


def buffer_of(gpu: Gpu, tensor: Tensor, name: str):
    """What lies between the rows is out of bounds."""
    size = tensor.element_size()
    offset = tensor.storage_offset() * size % 16
    return gpu.buffer(tensor.view(BITS[size]).numpy(), name, align=offset & -offset or 256)


# states, (sequences, tokens), hidden size, gap, tokens per block, bytes of a slice: one tile and
# several, numbers of states with every remainder, more tiles than warps, one slice and several with
# a tail, rows that are read by 16 bytes, rows that are not, and rows whose ends are not.
SHAPES = (
    (2, (1, 3), 8, 16, 1, 256),
    (5, (2, 2), 160, 16, 3, 256),
    (6, (1, 4), 77, 1, 4, 256),
    (19, (1, 2), 300, 16, 2, 512),
)
NAMES = ["one-tile", "slices", "unaligned", "many-tiles"]


@pytest.mark.parametrize("shape", SHAPES, ids=NAMES)
@pytest.mark.parametrize("dtype", MANGLED, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_masked_update(dtype: torch.dtype, shape: tuple) -> None:
    num_states, tokens, hidden_size, gap, tokens_per_block, slice_bytes = shape
    states = some_states(num_states, tokens, hidden_size, dtype, gap)
    earlier = empty_block_state(num_states - 1, torch.device("cpu"))
    reference.accumulate_blocks(*earlier, [h * 0.7 for h in states])
    mask = torch.ones(tokens, dtype=torch.bool)
    mask[0, 0] = False
    states[0][-1, -1, hidden_size - 1] = torch.nan
    states[-1][-1, -1, 0] = torch.inf  # the same token, counted once
    wanted = tuple(part.clone() for part in earlier)
    reference.accumulate_blocks(*wanted, states, mask)
    run = Run(states, mask, tokens_per_block, slice_bytes, earlier)
    report = run.launch()
    check_state((run.moments, run.tallies), wanted, dtype, SHORT)
    size = states[0].element_size()
    for buffer in run.buffers:
        counts = report.load_counts(buffer)
        # No pair of sums in float32 was formed again; of float64 states near ones are.
        if dtype != torch.float64:
            assert counts.max() == 1, "a byte was loaded twice"
        # Padding is not read.
        assert (counts > 0).sum() == int(mask.sum()) * hidden_size * size
        if gap == 16 and hidden_size % 16 == 0:
            again = {64} if counts.max() > 1 else set()
            assert report.load_widths(buffer) == {128} | again


# Cases of which a pair must be summed in float64, or has a result by definition.
HARD = ("massive", "identical", "opposite", "zero-vectors", "short-first", "large", "small")
HARD += ("distance-1e-2-longer", "strided")

SUMMED_AGAIN = ("massive", "opposite", "short-first", "large", "small", "distance-1e-2-longer")


def hard_cases() -> list[BlockCase]:
    found = [case for case in block_cases() if case.name.startswith(HARD)]
    found += [c for c in block_cases((torch.float32, torch.bfloat16)) if c.name == "distance-1e-7"]
    return found


@pytest.mark.parametrize("case", hard_cases(), ids=str)
def test_case(case: BlockCase) -> None:
    """One token of each case against the exact metrics of its pairs."""
    states = [as_rows(h).flatten(0, 1)[1:2, :200][None] for h in case.states()]
    run = Run(states)
    report = run.launch()
    assert run.tallies.tolist() == [1, 0, 1]
    if case.name.startswith(SUMMED_AGAIN) and case.dtype in (torch.float32, torch.bfloat16):
        assert max(report.load_counts(buffer).max() for buffer in run.buffers) > 1
    check_token_blocks(run.moments, [h[0, 0] for h in states], short_sums=True)


def test_hopper() -> None:
    states = some_states(7, (1, 3), 136, torch.bfloat16, 16)
    wanted = empty_block_state(6, torch.device("cpu"))
    reference.accumulate_blocks(*wanted, states)
    run = Run(states, arch="sm_90")
    run.launch()
    check_state((run.moments, run.tallies), wanted, torch.bfloat16, SHORT)


def test_neighbouring_floats_are_told_apart() -> None:
    """One entry moved by one unit in its last place: |d| / |x| is 5e-9, far below float32's."""
    first = torch.randn(1, 1, 96, generator=torch.Generator().manual_seed(1))
    second = first.clone()
    second[..., 50] = torch.nextafter(first[..., 50], torch.tensor(torch.inf))
    run = Run([first, second])
    run.launch()
    check_token_blocks(run.moments, [first[0, 0], second[0, 0]], short_sums=True)


def test_result_does_not_depend_on_the_order_of_blocks() -> None:
    """One block at a time or all together; and two blocks that share the tokens otherwise."""
    states = some_states(5, (3, 3), 64, torch.float32, 16)
    found = []
    for at_once in (THREADS, 1 << 17):
        gpu = compiled("sm_80")
        usual, gpu.max_threads = gpu.max_threads, at_once
        run = Run(states, tokens_per_block=1)
        run.launch()
        gpu.max_threads = usual
        found.append(run.moments)
    assert torch.equal(*found)


def test_more_blocks_than_warps_join_in_order() -> None:
    """Sums of 9 blocks of one token equal the sequential ones of shares of two, bit by bit."""
    states = some_states(2, (1, 9), 16, torch.float32, 16)
    tokens = []
    for t in range(9):
        single = Run([h[:, t : t + 1] for h in states])
        single.launch()
        tokens.append(single.moments)
    shares = [sum(tokens[first + 1 : first + 2], tokens[first]) for first in range(0, 9, 2)]
    wanted = sum(shares[1:], shares[0])
    wanted[-1] = torch.stack(tokens)[:, -1].amax(0)
    run = Run(states, tokens_per_block=1)
    run.launch()
    assert torch.equal(run.moments, wanted)
    assert run.tallies.tolist() == [9, 0, 9]


def test_tokens_and_rows_beyond_two_billion() -> None:
    """The last block of a sequence of 2^31 + 3 tokens, in rows that far apart; no other exists."""
    first, hidden_size = 2**31, 24
    generator = torch.Generator().manual_seed(4)
    states = [h.bfloat16()[None] for h in walk(2, (3, hidden_size), 0.2)(generator)]
    gpu = compiled("sm_80")
    gpu.memory = type(gpu.memory)()
    row = 2 * hidden_size
    buffers = [
        gpu.sparse((first + 3) * row, {first * row: h.view(torch.int16).numpy()}, "states")
        for h in states
    ]
    mask = np.ones(3, np.uint8)
    partials, counts = np.empty((1, TILE_WORDS)), np.empty(2, np.int64)
    pointers = [
        gpu.sparse(first + 3, {first: mask}, "mask"),
        None,
        None,
        gpu.sparse(16 * TILE_WORDS, {8 * TILE_WORDS: partials}, "partials", initialised=False),
        gpu.sparse(32, {16: counts}, "counts", initialised=False),
    ]
    arguments = pack(buffers, states, pointers, [first + 3, first + 3, first], [3, 1, 24, 128])
    name = kernel_name(gpu, "block_metrics_kernel", MANGLED[torch.bfloat16])
    gpu.launch(name, 2, THREADS, [arguments], 3 * 256, blocks=range(1, 2))
    wanted = empty_block_state(2, torch.device("cpu"))
    reference.accumulate_blocks(*wanted, states)
    assert counts.tolist() == [3, 0]
    squared = partials.reshape(7, 32)[1]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert squared[SIDE * i + j] == pytest.approx(wanted[0][1, i, j].item(), rel=2 * SHORT)


def test_rows_longer_than_their_buffers_are_reported() -> None:
    states = [torch.ones(1, 2, 60) * k for k in range(1, 4)]
    gpu = compiled("sm_80")
    gpu.memory = type(gpu.memory)()
    buffers = [buffer_of(gpu, h, "h") for h in states]
    space = [gpu.buffer(np.zeros(4096), "space") for _ in range(5)]
    arguments = pack(buffers, states, [None, *space[1:]], [2, 2, 2], [3, 1, 64, 64])
    name = kernel_name(gpu, "block_metrics_kernel", MANGLED[torch.float32])
    with pytest.raises(FaultError, match="out of bounds"):
        gpu.launch(name, 1, THREADS, [arguments], 3 * 256)


@pytest.mark.parametrize("hidden_size", [1, 64, 576, 4096, 16384])
def test_launches_cover_every_token_once(hidden_size: int) -> None:
    module = pytest.importorskip("simdiff_kernels._C_cuda", reason="_C_cuda is not built")
    for num_states in (2, 4, 5, 31, 33, 41, 81, 127, MAX_STATES):
        words = module.block_scratch_words(num_states)
        for num_tokens in (1, 7, 263, 264, 265, 4096, 2**31 - 1, 2**31 + 17):
            for dtype in MANGLED:
                name = str(dtype).removeprefix("torch.")
                shape = module.block_launch_shape(num_tokens, num_states, hidden_size, name)
                covered = shape["blocks"] * shape["tokens_per_block"]
                assert covered - shape["tokens_per_block"] < num_tokens <= covered
                assert shape["blocks"] * (shape["num_tiles"] * TILE_WORDS + 2) <= words
                assert shape["threads"] == THREADS
                slice_bytes, row_bytes = shape["slice_bytes"], hidden_size * dtype.itemsize
                assert slice_bytes in (2048, 1024, 512, 256) or slice_bytes >= row_bytes
                assert slice_bytes % 256 == 0
                assert num_states * slice_bytes <= 79 * 1024
                # At most 32 entries for each lane, which bounds the error.
                assert slice_bytes // dtype.itemsize <= 32 * 32
    assert module.max_states == MAX_STATES
