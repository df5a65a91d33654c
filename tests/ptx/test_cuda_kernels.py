"""The CUDA kernels as nvcc compiles them, executed without a GPU: numbers, faults, bytes loaded."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ptx import FaultError, Gpu, Report
from ptx.compilers import find_nvcc, nvcc_ptx
from simdiff_kernels import METRICS, TokenMetrics, reference
from simdiff_kernels.metrics import result_dtype
from simdiff_kernels.ops import as_rows
from simdiff_kernels.running import _empty_state as empty_states
from simdiff_kernels.testing import Case, cases, check_metrics, near

pytestmark = pytest.mark.skipif(find_nvcc() is None, reason="nvcc is not installed")

CSRC = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
MANGLED = {
    torch.float32: "f",
    torch.float64: "d",
    torch.bfloat16: "NS0_8BFloat16E",
    torch.float16: "6__half",
}
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
PARTIAL_WORDS = 26  # PartialState: four for each metric, two counts
MAX_BLOCKS = 512


@cache
def compiled(arch: str) -> Gpu:
    """All kernels of layer_metrics.cu for one architecture, parsed and bound once."""
    source = f'#include "{CSRC / "layer_metrics.cu"}"\n'
    return Gpu(nvcc_ptx(source, arch, "-std=c++17", "-O3"))


def kernel_name(gpu: Gpu, dtype: torch.dtype, warps_per_row: int) -> str:
    pattern = f"layer_metrics_kernelI{MANGLED[dtype]}Li{warps_per_row}E"
    (name,) = [name for name in gpu.programs if pattern in name]
    return name


@dataclass
class Shape:
    """How tokens are dealt out: what csrc/cuda/layer_metrics.cu calls LaunchShape."""

    blocks: int
    warps_per_row: int
    tokens_per_group: int

    @staticmethod
    def of(num_tokens: int, hidden_size: int, dtype: torch.dtype) -> Shape:
        """What the launcher chooses."""
        module = pytest.importorskip("simdiff_kernels._C_cuda", reason="_C_cuda is not built")
        name = str(dtype).removeprefix("torch.")
        found = module.launch_shape(num_tokens, hidden_size, name)
        assert found["threads"] == 256
        return Shape(found["blocks"], found["warps_per_row"], found["tokens_per_group"])

    @staticmethod
    def forced(num_tokens: int, warps_per_row: int, tokens_per_group: int) -> Shape:
        """Several tiles per warp without 131072 tokens."""
        per_block = tokens_per_group * (8 // warps_per_row)
        return Shape(-(-num_tokens // per_block), warps_per_row, tokens_per_group)


@dataclass
class Run:
    """One launch on hidden states `(outer, inner, hidden_size)`."""

    before: Tensor
    after: Tensor
    mask: Tensor | None = None
    store: bool = True
    reduce: bool = True
    earlier: tuple[Tensor, Tensor] | None = None
    shape: Shape | None = None
    moments: Tensor = field(init=False)
    tallies: Tensor = field(init=False)
    per_token: Tensor = field(init=False)
    finished: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        moments, tallies = empty_states(torch.device("cpu"), 1)
        self.moments, self.tallies = self.earlier or (moments[0], tallies[0])
        size = (len(METRICS), *self.before.shape[:2])
        self.per_token = torch.empty(size, dtype=result_dtype(self.before.dtype))
        self.finished = np.zeros(1, np.uint32)

    def launch(self, arch: str, *, check: bool = True) -> Report:
        gpu = compiled(arch)
        gpu.memory = type(gpu.memory)()
        outer, inner, hidden_size = self.before.shape
        shape = self.shape or Shape.of(outer * inner, hidden_size, self.before.dtype)
        self.x, self.y = (
            buffer_of(gpu, states, name)
            for states, name in ((self.before, "before"), (self.after, "after"))
        )
        mask = self.mask
        pointers = [
            self.x,
            self.y,
            None if mask is None else gpu.buffer(mask.view(torch.uint8).numpy(), "mask"),
            gpu.buffer(self.per_token.numpy(), "out", initialised=False) if self.store else None,
            gpu.buffer(self.moments.numpy(), "moments") if self.reduce else None,
            gpu.buffer(self.tallies.numpy(), "tallies") if self.reduce else None,
        ]
        if self.reduce:
            # The last block reads what all others wrote before they raised the counter.
            partials = np.empty((MAX_BLOCKS, PARTIAL_WORDS))
            pointers.append(gpu.buffer(partials, "partials", initialised=False, conflicts=False))
            pointers.append(gpu.buffer(self.finished, "num_finished", conflicts=False))
        else:
            pointers += [None, None]
        strides = [*self.before.stride()[:2], *self.after.stride()[:2]]
        addresses = [0 if p is None else p.address for p in pointers]
        numbers = [*strides, outer * inner, inner, shape.tokens_per_group]
        arguments = struct.pack("<8Q7qi4x", *addresses, *numbers, hidden_size)
        name = kernel_name(gpu, self.before.dtype, shape.warps_per_row)
        return gpu.launch(name, shape.blocks, 256, [arguments], check=check)


def buffer_of(gpu: Gpu, tensor: Tensor, name: str) -> Any:
    """What lies between the rows is out of bounds; NumPy has no bfloat16, so bits are passed."""
    size = tensor.element_size()
    offset = tensor.storage_offset() * size % 16
    array = tensor.view(BITS[size]).numpy()
    base = gpu.buffer(array, name, align=offset & -offset or 16)
    return base


def check_state(run: Run, wanted: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(run.tallies, wanted[1])
    assert torch.allclose(run.moments, wanted[0], rtol=1e-13, atol=0)
    assert run.finished == 0, "the counter must be ready for the next update"


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("case", cases(), ids=str)
def test_case(case: Case, arch: str) -> None:
    before, after = (as_rows(states) for states in case.states())
    run = Run(before, after)
    run.launch(arch)
    check_metrics(TokenMetrics(*run.per_token.unbind(0)), before, after)
    check_folded(run, before, after)


def check_folded(run: Run, before: Tensor, after: Tensor) -> None:
    """The state against the specification, where rounding decides against the kernel's own tokens.

    The cosine distance of near-identical or opposite states differs in digits that the float64
    sums do not have; which of two equal tokens is the largest, too.
    """
    moments, tallies = (state[0] for state in empty_states(torch.device("cpu"), 1))
    reference.accumulate(moments, tallies, before, after)
    assert torch.allclose(run.moments[:, 1:], moments[:, 1:], rtol=1e-13, atol=0)
    assert torch.equal(run.tallies[len(METRICS) :], tallies[len(METRICS) :])
    assert run.finished == 0, "the counter must be ready for the next update"
    values = run.per_token.flatten(1)
    cosine = values[0].double()
    folded = torch.stack([cosine.sum(), cosine.square().sum(), cosine.max()])
    assert torch.allclose(run.moments[:, 0], folded, rtol=2.0**-22, atol=0)
    peaks = values.gather(1, run.tallies[: len(METRICS), None])[:, 0]
    assert torch.equal(peaks, values.max(dim=1).values)


def padded_states(tokens: tuple[int, int], hidden_size: int, dtype: torch.dtype, aligned: bool):
    """Near-identical states with a massive channel, gaps between rows and no two tokens alike."""
    generator = torch.Generator().manual_seed(hidden_size)
    build = near((*tokens, hidden_size), 0.01, massive=True, dtype=torch.float64)
    first, second = build(generator)
    share = torch.rand(*tokens, 1, generator=generator, dtype=torch.float64)
    pair = first.to(dtype), torch.lerp(first, second, share).to(dtype)
    gap = 16 if aligned else 1
    padded = [torch.zeros(tokens[0], tokens[1] + 1, hidden_size + gap, dtype=dtype) for _ in pair]
    for space, values in zip(padded, pair, strict=True):
        space[:, : tokens[1], :hidden_size] = values
    return tuple(space[:, : tokens[1], :hidden_size] for space in padded)


# (sequences, tokens), hidden size, aligned rows, warps per row, tokens per group: several tiles per
# warp, several blocks and a single one, several rounds of loads per row, ends of rows.
SHAPES = (
    ((3, 29), 576, True, 1, 9),
    ((3, 29), 200, False, 1, 40),
    ((2, 4), 2056, True, 8, 3),
    ((5, 9), 65, False, 8, 34),
    ((2, 3), 4104, True, 1, 1),
)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", MANGLED, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_masked_update(dtype: torch.dtype, shape: tuple[Any, ...], arch: str) -> None:
    tokens, hidden_size, aligned, warps_per_row, tokens_per_group = shape
    before, after = padded_states(tokens, hidden_size, dtype, aligned)
    moments, tallies = (state[0] for state in empty_states(torch.device("cpu"), 1))
    reference.accumulate(moments, tallies, before.double() / 2, after.double() / 2.5)
    mask = torch.ones(tokens, dtype=torch.bool)
    mask[0, :2] = mask[-1, -1] = False
    after[1, 2, 5] = torch.nan
    before[1, 0, hidden_size - 1] = torch.inf
    wanted = moments.clone(), tallies.clone()
    reference.accumulate(*wanted, before, after, mask)
    forced = Shape.forced(mask.numel(), warps_per_row, tokens_per_group)
    run = Run(before, after, mask, store=False, earlier=(moments, tallies), shape=forced)
    report = run.launch(arch)
    check_state(run, wanted)
    for buffer in (run.x, run.y):
        assert report.load_counts(buffer).max() == 1, "a byte was loaded twice"
        # Padding is not read.
        assert report.loaded_bytes(buffer) == mask.sum() * hidden_size * before.element_size()
        if aligned:
            assert report.load_widths(buffer) == {128}


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_rows_that_start_unaligned_alike_are_read_wide(arch: str) -> None:
    """Contiguous rows of a size not divisible by 8: only the ends are read entry by entry."""
    before, after = near((2, 4, 1021), 0.1, dtype=torch.bfloat16)(torch.Generator().manual_seed(1))
    run = Run(before, after, reduce=False)
    report = run.launch(arch)
    check_metrics(TokenMetrics(*run.per_token.unbind(0)), before, after)
    assert report.load_counts(run.x).max() == report.load_counts(run.x).min() == 1
    assert report.load_widths(run.x) == {16, 128}
    wide = sum(a.offsets.size for a in report._accesses(run.x, False) if a.nbytes == 16)
    assert wide >= 8 * (1021 // 8 - 1)


def test_result_does_not_depend_on_the_order_of_blocks() -> None:
    """One block at a time or all together: another block is the last, the bits are the same."""
    before, after = padded_states((9, 40), 64, torch.float32, True)
    states = []
    for at_once in (256, 1 << 17):
        gpu = compiled("sm_80")
        usual, gpu.max_threads = gpu.max_threads, at_once
        run = Run(before, after, store=False)
        run.launch("sm_80")
        gpu.max_threads = usual
        states.append(run.moments)
    assert Shape.of(360, 64, torch.float32).blocks == 45
    assert torch.equal(*states)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_rows_beyond_two_billion_elements(dtype: torch.dtype) -> None:
    """Three sequences 2^31 - 512 elements apart, of which nothing but one row each exists."""
    far = 2**31 - 512
    before, after = near((3, 576), 0.1, dtype=dtype)(torch.Generator().manual_seed(3))
    gpu, size = compiled("sm_80"), before.element_size()
    gpu.memory = type(gpu.memory)()
    addresses = []
    for tensor in (before, after):
        rows = tensor.view(BITS[size]).numpy()
        pieces = {size * far * sequence: rows[sequence] for sequence in range(3)}
        addresses.append(gpu.sparse(size * (2 * far + 576), pieces, "states").address)
    out = torch.empty(len(METRICS), 3)
    addresses += [0, gpu.buffer(out.numpy(), "out", initialised=False).address, 0, 0, 0, 0]
    numbers = [far, 576, far, 576, 3, 1, 1]
    name = kernel_name(gpu, dtype, 1)
    gpu.launch(name, 1, 256, [struct.pack("<8Q7qi4x", *addresses, *numbers, 576)])
    check_metrics(TokenMetrics(*out.unbind(0)), before, after)


def test_tokens_beyond_two_billion() -> None:
    """The block whose first token is number 2^31, of a sequence of 2^31 + 3 tokens."""
    first = 2**31
    before, after = near((3, 96), 0.1)(torch.Generator().manual_seed(4))
    gpu = compiled("sm_80")
    gpu.memory = type(gpu.memory)()
    num_tokens, row = first + 3, 96 * 4
    addresses = [
        gpu.sparse(num_tokens * row, {first * row: tensor.numpy()}, "states").address
        for tensor in (before, after)
    ]
    out = torch.empty(len(METRICS), 3)
    pieces = {4 * (m * num_tokens + first): out[m].numpy() for m in range(len(METRICS))}
    result = gpu.sparse(4 * len(METRICS) * num_tokens, pieces, "out", initialised=False)
    addresses += [0, result.address, 0, 0, 0, 0]
    numbers = [0, 96, 0, 96, num_tokens, num_tokens, first]
    arguments = [struct.pack("<8Q7qi4x", *addresses, *numbers, 96)]
    name = kernel_name(gpu, torch.float32, 8)
    gpu.launch(name, 2, 256, arguments, blocks=range(1, 2))
    check_metrics(TokenMetrics(*out.unbind(0)), before, after)


@pytest.mark.parametrize("hidden_size", [1, 64, 576, 4096, 16384])
def test_launches_cover_every_token_once(hidden_size: int) -> None:
    for num_tokens in (1, 7, 31, 1023, 1024, 4096, 8192, 8193, 131072, 2**31 - 1, 2**31 + 17):
        for dtype in MANGLED:
            shape = Shape.of(num_tokens, hidden_size, dtype)
            assert 1 <= shape.blocks <= MAX_BLOCKS
            tokens_per_block = shape.tokens_per_group * (8 // shape.warps_per_row)
            assert (shape.blocks - 1) * tokens_per_block < num_tokens
            assert shape.blocks * tokens_per_block >= num_tokens


def test_rows_longer_than_their_buffers_are_reported() -> None:
    rows = torch.ones(2, 3, 60)
    gpu = compiled("sm_80")
    gpu.memory = type(gpu.memory)()
    addresses = [gpu.buffer(rows.numpy(), name).address for name in ("before", "after")]
    out = gpu.buffer(np.empty((6, 6), np.float32), "out", initialised=False)
    addresses += [0, out.address, 0, 0, 0, 0]
    arguments = [struct.pack("<8Q7qi4x", *addresses, 180, 60, 180, 60, 6, 3, 1, 64)]
    name = kernel_name(gpu, torch.float32, 1)
    with pytest.raises(FaultError, match="out of bounds"):
        gpu.launch(name, 1, 256, arguments)


# One warp or eight a row, one tile or several, one block or several.
TIES = ((1, 2), (1, 40), (1, 100), (8, 3), (8, 40))


@pytest.mark.parametrize(("warps_per_row", "tokens_per_group"), TIES)
def test_of_equal_tokens_the_earliest_counts(warps_per_row: int, tokens_per_group: int) -> None:
    row = near((2, 1, 40), 0.1)(torch.Generator().manual_seed(6))
    before, after = (states[:1].repeat(1, 90, 1) for states in row)
    mask = torch.ones(1, 90, dtype=torch.bool)
    mask[0, :4] = False
    shape = Shape.forced(90, warps_per_row, tokens_per_group)
    run = Run(before, after, mask, store=False, shape=shape)
    run.launch("sm_80")
    assert run.tallies.tolist() == [4] * len(METRICS) + [86, 0, 90]
    again = Run(before, after, mask, store=False, shape=shape, earlier=(run.moments, run.tallies))
    again.launch("sm_80")
    assert again.tallies.tolist() == [4] * len(METRICS) + [172, 0, 180]


@pytest.mark.parametrize("warps_per_row", [1, 8])
def test_masked_tokens_are_stored_but_not_counted(warps_per_row: int) -> None:
    before, after = padded_states((3, 15), 96, torch.float32, True)
    mask = torch.rand(3, 15, generator=torch.Generator().manual_seed(7)) > 0.5
    run = Run(before, after, mask, shape=Shape.forced(45, warps_per_row, 35))
    run.launch("sm_80")
    check_metrics(TokenMetrics(*run.per_token.unbind(0)), before, after)
    moments, tallies = (state[0] for state in empty_states(torch.device("cpu"), 1))
    reference.accumulate(moments, tallies, before, after, mask)
    check_state(run, (moments, tallies))
