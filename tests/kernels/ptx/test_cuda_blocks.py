"""The CUDA kernels of accumulate_blocks as nvcc compiles them, executed without a GPU."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch

from ptxcheck import FaultError
from ptxcheck.compilers import find_nvcc
from simdiff_kernels import reference
from simdiff_kernels.metrics import APART, COUNTED, LEFT_OUT
from simdiff_kernels.ops import as_rows
from simdiff_kernels.testing import BlockCase, block_cases, walk

from .block_updates import (
    FOLD_THREADS,
    MANGLED,
    MAX_STATES,
    SHORT,
    STEP_BYTES,
    THREADS,
    UNIT_SUMS,
    Run,
    check_exactly,
    compiled,
    empty_state,
    kernel_name,
    num_units,
    pack_sums,
    some_states,
)

pytestmark = pytest.mark.skipif(find_nvcc() is None, reason="nvcc is not installed")


# states, (sequences, tokens), hidden size, gap, tokens per CTA, bytes of a slice: one group and
# several, every number of missing states, shared quads and whole ones, one slice and several with a
# tail, rows that are read by 16 bytes, rows that are not, and rows whose ends are not.
SHAPES = (
    (2, (1, 3), 8, 16, 1, 128),
    (5, (2, 2), 160, 16, 3, 256),
    (8, (1, 4), 77, 1, 4, 128),
    (18, (1, 2), 300, 16, 2, 512),
    (33, (1, 1), 192, 16, 1, 256),
)


NAMES = ["one-group", "slices", "unaligned", "many-tiles", "33-states"]


@pytest.mark.parametrize("absolute", [False, True], ids=["", "absolute"])
@pytest.mark.parametrize("shape", SHAPES, ids=NAMES)
@pytest.mark.parametrize("dtype", MANGLED, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_update(dtype: torch.dtype, shape: tuple, absolute: bool) -> None:
    """Onto an earlier state; something massive is written by the first layer, erased by the last.

    One token is not finite: it is left out of all pairs and counted once.
    """
    num_states, tokens, hidden_size, gap, tokens_per_cta, slice_bytes = shape
    states = some_states(num_states, tokens, hidden_size, dtype, gap)
    earlier = empty_state(1, num_states)
    reference.accumulate_blocks(*earlier, [h * 0.7 for h in states], absolute=True)
    if tokens != (1, 1):
        states[0][-1, -1, hidden_size - 1] = torch.nan
        states[-1][-1, -1, 0] = torch.inf
    run = Run(
        states,
        absolute=absolute,
        tokens_per_cta=tokens_per_cta,
        slice_bytes=slice_bytes,
        earlier=earlier,
    ).launch()
    run.check()


def short_first(num_states: int, tokens: tuple, hidden_size: int, dtype: torch.dtype) -> list:
    """A first state that is 100 times shorter than the others, as embeddings are."""
    states = walk(num_states - 1, (*tokens, hidden_size), 0.3)(torch.Generator().manual_seed(3))
    states[0] = torch.randn_like(states[0]) / 100
    return [h.to(dtype) for h in states]


@pytest.mark.parametrize("num_states", [2, 7, 10, 29, 33])
def test_every_byte_is_loaded_once(num_states: int) -> None:
    """Also with a short first state, whose pairs float32 measures by scaling it."""
    run = Run(short_first(num_states, (1, 2), 264, torch.bfloat16)).launch()
    run.check()
    for buffer in run.buffers:
        assert (run.reports[0].load_counts(buffer) == 1).all()
        assert run.reports[0].load_widths(buffer) == {128}


def test_float32_is_enough_for_states_of_unlike_lengths_and_for_near_ones() -> None:
    generator = torch.Generator().manual_seed(5)
    unlike = [torch.randn(1, 1, 264, generator=generator) * 3 ** (k % 2) for k in range(9)]
    near, wide, some = (
        [h.float() for h in walk(8, (1, 1, 264), step)(generator)] for step in (3e-3, 0.3, 0.05)
    )
    parallel = [some[0] / 100, *some[1:]]  # a power of two leaves 1.28 times the length
    for states in (unlike, near, parallel):
        run = Run(states).launch()
        run.check()
        assert all((run.reports[0].load_counts(b) == 1).all() for b in run.buffers)
    # Pairs before and after something massive is written and erased, whose growths are inexact.
    for h in wide[2:5]:
        h[..., 7] += 300 * h.norm()
    run = Run(wide).launch()
    run.check()
    assert all((run.reports[0].load_counts(b) == 1).all() for b in run.buffers[5:])


def test_unaligned_rows_are_loaded_once() -> None:
    wide = short_first(6, (1, 3), 90, torch.bfloat16)
    run = Run([h[..., 1 : 84 - k] if k < 2 else h[..., k : 82 + k] for k, h in enumerate(wide)][2:])
    run.launch().check()
    assert all(r.load_counts(b).max() == 1 for r in run.reports for b in run.buffers)


def test_kinds_places_and_chunks() -> None:
    """Padding is not read, tokens apart only for their row sums; several updates' worth at once."""
    states = short_first(6, (3, 5), 72, torch.bfloat16)
    kinds = torch.full((3, 5), COUNTED, dtype=torch.uint8)
    kinds[:, 0] = APART
    kinds[0, 3:] = kinds[2, 1] = LEFT_OUT
    states[2][1, 2, 7] = torch.nan
    left_out = (kinds == LEFT_OUT).flatten().repeat_interleave(2 * 72)
    apart = (kinds == APART).flatten().repeat_interleave(2 * 72)
    for places, at_once in (((1, 3, 5), 4), ((-1, 0, 5), 15), ((2, 0, 1), 7), ((5, 0, 1), 15)):
        for wants_sums in (True, False):
            run = Run(states, kinds, places, 4, wants_sums=wants_sums, at_once=at_once)
            run.launch().check()
            for buffer in run.buffers:
                loads = run.reports[0].load_counts(buffer)
                here = torch.from_numpy(loads[: at_once * 144])
                unread = left_out if wants_sums else left_out | apart
                assert not here[unread[: at_once * 144]].any()
                if at_once == 15:
                    assert here[~unread].bool().all()


HARD = ("massive", "identical", "opposite", "zero-vectors", "short-first", "large", "small")


HARD += ("distance-1e-2", "distance-1e-4-longer", "strided", "single", "random-1-", "random-12-")


SUMMED_AGAIN = ("identical", "opposite", "large", "small", "distance-1e-4-longer")


def hard_cases() -> list[BlockCase]:
    found = [case for case in block_cases() if case.name.startswith(HARD)]
    found += [c for c in block_cases((torch.float32, torch.bfloat16)) if c.name == "distance-1e-7"]
    return found


@pytest.mark.parametrize("case", hard_cases(), ids=str)
def test_case(case: BlockCase) -> None:
    """One token of each case against the exact metrics of its pairs and layers."""
    states = [as_rows(h).flatten(0, 1)[-1:, :200][None] for h in case.states()]
    absolute = case.dtype in (torch.float32, torch.float64)
    run = Run(states, absolute=absolute).launch()
    assert run.counts.tolist() == [[1, 0, 1]]
    loads = max(run.reports[0].load_counts(buffer).max() for buffer in run.buffers)
    if case.dtype in (torch.float32, torch.bfloat16):
        if case.name.startswith(SUMMED_AGAIN):
            assert loads > 1
        if case.name == "short-first":
            assert loads == 1
    check_exactly(run)
    run.check_sums()


@pytest.mark.parametrize("massive", [False, True], ids=["", "massive"])
@pytest.mark.parametrize("growth", [1.0, 1.5])
@pytest.mark.parametrize("step", [3e-1, 3e-2, 3e-3, 3e-4])
def test_distances_down_to_1e_7(step: float, growth: float, massive: bool) -> None:
    """With massive channels and layers that lengthen the vector: 1e-5 at most."""
    states = walk(5, (1, 1, 512), step, growth=growth)(torch.Generator().manual_seed(8))
    if massive:
        for h in states:
            h[..., 100] += 300
    run = Run([h.float() for h in states], slice_bytes=512).launch()
    check_exactly(run)
    (wanted, _), _ = run.reference()
    i, j = torch.triu_indices(6, 6, 1)
    error = (run.moments / wanted - 1)[0, 0, i, j].abs()
    assert error.max() < 1e-5
    assert error.median() < 1e-6


def test_hopper() -> None:
    run = Run(some_states(7, (1, 3), 136, torch.bfloat16, 16), arch="sm_90").launch()
    run.check()


def test_neighbouring_floats_are_told_apart() -> None:
    """One entry moved by one unit in its last place: |d| / |x| is 5e-9, far below float32's."""
    first = torch.randn(1, 1, 96, generator=torch.Generator().manual_seed(1))
    second = first.clone()
    second[..., 50] = torch.nextafter(first[..., 50], torch.tensor(torch.inf))
    third = first.clone()
    third[..., 3] += 1e-25  # its square is zero in float32
    run = Run([first, second, third * 1.0, first * 1e-3, second]).launch()
    check_exactly(run)


def test_a_token_does_not_depend_on_its_neighbours() -> None:
    """Bit by bit, however tokens are dealt out, to CTAs, launches or updates."""
    states = some_states(6, (3, 3), 64, torch.float32, 16)
    states[0][1] *= 1e-3
    ways = [Run(states, tokens_per_cta=n, at_once=m).launch() for n, m in ((1, 9), (4, 9), (2, 5))]
    single = [Run([h[k // 3, k % 3][None, None] for h in states]).launch() for k in range(9)]
    sums = torch.stack([run.sums[:, 0, 0] for run in single], 1)
    for run in ways:
        assert torch.equal(run.sums.flatten(1, 2), sums)
        peaks = torch.stack([one.moments[0, -1] for one in single]).amax(0)
        assert torch.equal(run.moments[0, -1], peaks)
    assert torch.equal(ways[0].moments, ways[1].moments)


def test_result_does_not_depend_on_the_order_of_blocks() -> None:
    states = some_states(5, (3, 3), 64, torch.float32, 16)
    found = []
    for at_once in (THREADS, 1 << 17):
        gpus = [compiled(name, "sm_80") for name in ("block_sums.cu", "block_fold.cu")]
        usual = [gpu.max_threads for gpu in gpus]
        for gpu in gpus:
            gpu.max_threads = at_once
        found.append(Run(states, tokens_per_cta=1).launch())
        for gpu, threads in zip(gpus, usual, strict=True):
            gpu.max_threads = threads
    assert torch.equal(found[0].moments, found[1].moments)
    assert torch.equal(found[0].sums, found[1].sums)


def test_many_tokens_fold_in_order() -> None:
    """More tokens than a CTA of the fold takes at a time, in two running states."""
    states = short_first(3, (1, 300), 8, torch.float32)
    kinds = (torch.rand(1, 300, generator=torch.Generator().manual_seed(0)) < 0.9).byte()
    Run(states, kinds, (0, 0, 170), 2, tokens_per_cta=20, slice_bytes=128).launch().check()


def test_tokens_and_rows_beyond_two_billion() -> None:
    """The last CTA of a sequence of 2^31 + 3 tokens, in rows that far apart; no other exists."""
    first, hidden_size, count = 2**31, 24, 3
    states = [h[0].contiguous() for h in short_first(3, (1, count), hidden_size, torch.bfloat16)]
    gpu = compiled("block_sums.cu", "sm_80")
    gpu.memory = type(gpu.memory)()
    row = 2 * hidden_size
    buffers = [
        gpu.sparse((first + count) * row, {first * row: h.view(torch.int16).numpy()}, "states")
        for h in states
    ]
    kinds = np.array([1, 1, 1], np.uint8)
    layers = [np.empty((count, 4)) for _ in range(2)]
    places = {(layer * (first + count) + first) * 32: a for layer, a in enumerate(layers)}
    norms, pairs = np.empty((count, 3)), np.empty((count, 3, 2))
    units = np.empty((1, num_units(3, 1), UNIT_SUMS))
    hidden = {"initialised": False}
    unit_bytes = units.nbytes
    pointers = [
        gpu.sparse(first + count, {first: kinds}, "kinds").address,
        gpu.sparse(2 * (first + count) * 32, places, "sums", **hidden).address,
        gpu.sparse(
            (first // 1024 + 1) * unit_bytes, {first // 1024 * unit_bytes: units}, "units", **hidden
        ).address,
    ]
    tokens = [
        0,
        first + count,
        gpu.sparse((first + count) * 24, {first * 24: norms}, "norms", **hidden).address,
        gpu.sparse((first + count) * 48, {first * 48: pairs}, "pairs", **hidden).address,
        0,
    ]
    strides = [h[None] for h in states]
    arguments = pack_sums(
        buffers,
        strides,
        pointers,
        tokens,
        [first + count, first + count, row],
        [1024, 3, 128, num_units(3, 1)],
    )
    name = kernel_name(gpu, MANGLED[torch.bfloat16], "Lb0E")
    cta = first // 1024
    gpu.launch(name, cta + 1, THREADS, [arguments], 2 * 3 * 128, ctas=range(cta, cta + 1))
    wanted, sums = Run(strides).reference()
    total = torch.from_numpy(pairs).sum(0)
    for number, (i, j) in enumerate(((0, 1), (0, 2), (1, 2))):
        assert total[number, 0] == pytest.approx(wanted[0][0, 1, i, j].item(), rel=2 * SHORT)
        assert total[number, 1] == pytest.approx(wanted[0][0, 0, i, j].item(), rel=16 * SHORT)
    assert np.allclose(np.stack(layers), sums[:, 0].numpy(), rtol=2 * SHORT, atol=0)


def test_the_fold_beyond_two_billion_tokens() -> None:
    """The last of two running states of tokens that lie that far on."""
    first, count = 2**31, 5
    generator = np.random.default_rng(0)
    norms, pairs = generator.random((count, 2)) + 1, generator.random((count, 1, 2))
    gpu = compiled("block_fold.cu", "sm_80")
    gpu.memory = type(gpu.memory)()
    moments, counts = np.zeros((2, 11, 2, 2)), np.zeros((2, 3), np.int64)
    kinds = np.array([1, 1, 0, 1, 1], np.uint8)
    arguments = struct.pack(
        "<Q4q?7x2q3Q2Q3q2i",
        gpu.sparse(first + count, {first: kinds}, "kinds").address,
        2,
        0,
        0,
        first,
        False,
        first,
        first + count,
        gpu.buffer(norms, "norms").address,
        gpu.buffer(pairs, "pairs").address,
        0,
        gpu.buffer(moments, "moments").address,
        gpu.buffer(counts, "counts").address,
        first + count,
        24,
        1,
        2,
        1,
    )
    gpu.launch(kernel_name(gpu, "block_fold_kernel"), 1, FOLD_THREADS, [arguments])
    assert counts.tolist() == [[0, 0, 5], [4, 0, 5]]
    used = kinds.astype(bool)
    assert moments[1, 1, 0, 1] == pytest.approx(pairs[used, 0, 0].sum(), rel=1e-14)
    assert moments[1, 5, 0, 1] == pytest.approx((pairs[used, 0, 1] ** 2).sum(), rel=1e-14)
    assert moments[1, 10, 0, 1] == pairs[used, 0, 0].max()
    assert not moments[0].any()


def test_rows_longer_than_their_buffers_are_reported() -> None:
    states = [torch.ones(1, 2, 60) * k for k in range(1, 4)]
    run = Run(states)
    run.hidden_size = 64
    with pytest.raises(FaultError, match="out of bounds"):
        run.launch()


@pytest.mark.parametrize("hidden_size", [1, 64, 576, 4096, 16384])
def test_launches_cover_every_token_once(hidden_size: int) -> None:
    module = pytest.importorskip("simdiff_kernels._C_cuda", reason="_C_cuda is not built")
    for num_states in (2, 4, 5, 31, 33, 41, 81, 127, MAX_STATES):
        for num_tokens in (1, 7, 1056, 1057, 4096, 2**31 - 1, 2**31 + 17):
            for dtype in MANGLED:
                name, absolute = str(dtype).removeprefix("torch."), num_tokens % 2 == 1
                arguments = num_tokens, num_states, hidden_size, name, absolute
                shape = module.block_launch_shape(*arguments)
                at_once = shape["tokens_at_once"]
                assert 0 < at_once <= num_tokens
                covered = shape["num_ctas"] * shape["tokens_per_cta"]
                assert covered - shape["tokens_per_cta"] < at_once <= covered
                slice_bytes, row_bytes = shape["slice_bytes"], hidden_size * dtype.itemsize
                assert slice_bytes % STEP_BYTES == 0
                assert slice_bytes < row_bytes + STEP_BYTES
                assert 2 * num_states * slice_bytes <= 73 * 1024
                assert slice_bytes <= 1024  # 64 entries for each lane, which bounds the error
                assert shape["units"] == num_units(num_states, slice_bytes // STEP_BYTES)
                words = module.block_scratch_words(*arguments)
                pairs = num_states * (num_states - 1) // 2
                per_token = num_states + pairs * (2 + absolute)
                units = shape["num_ctas"] * shape["units"] * UNIT_SUMS * (1 + absolute)
                assert words == at_once * per_token + units
                assert at_once * per_token <= 2**25 < (num_tokens + 1) * per_token or (
                    at_once == num_tokens
                )
    assert module.max_states == MAX_STATES
