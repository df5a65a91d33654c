"""The CUDA kernels as nvcc compiles them, executed without a GPU: numbers, faults, bytes loaded."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ptxcheck import FaultError, Gpu, Report
from ptxcheck.compilers import find_nvcc, nvcc_ptx
from simdiff_kernels import METRICS, TokenMetrics, reference
from simdiff_kernels.metrics import APART
from simdiff_kernels.ops import as_rows
from simdiff_kernels.running_states import empty_state
from simdiff_kernels.testing import Case, cases, check_metrics, near

pytestmark = pytest.mark.skipif(find_nvcc() is None, reason="nvcc is not installed")

CSRC = Path(__file__).resolve().parents[3] / "csrc" / "cuda"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
MANGLED = {
    torch.float32: "f",
    torch.float64: "d",
    torch.bfloat16: "NS_8BFloat16E",
    torch.float16: "NS_7Float16E",
}
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Shape:
    """How rows are dealt out to lanes: what csrc/cuda/row_sums.h calls RowShape."""

    row_lanes: int
    stages: int
    warps: int
    ctas: int = 1

    @staticmethod
    def of(num_tokens: int, hidden_size: int, dtype: torch.dtype, aligned: bool) -> Shape:
        """What the launcher chooses."""
        module = pytest.importorskip("simdiff_kernels._C_cuda", reason="_C_cuda is not built")
        name = str(dtype).removeprefix("torch.")
        aligned &= hidden_size * dtype.itemsize % 16 == 0  # as the launcher does
        return Shape(**module.row_shape(num_tokens, hidden_size, name, aligned))

    @property
    def rows(self) -> int:
        """Of a CTA at a time."""
        return 32 * self.warps // self.row_lanes


DIRECT = Shape(32, 0, 8, 4)
RINGS = (Shape(8, 4, 5), Shape(32, 8, 7), Shape(256, 8, 8))


@cache
def compiled(arch: str, file: str = "row_sums") -> Gpu:
    """All kernels of a file for one architecture, parsed and bound once."""
    return Gpu(nvcc_ptx(f'#include "{CSRC / file}.cu"\n', arch, "-std=c++17", "-O3"))


def fresh(arch: str, file: str = "row_sums") -> Gpu:
    gpu = compiled(arch, file)
    gpu.memory = type(gpu.memory)()
    return gpu


def kernel_name(gpu: Gpu, pattern: str) -> str:
    (name,) = [name for name in gpu.programs if pattern in name]
    return name


def ring_name(gpu: Gpu, dtype: torch.dtype, shape: Shape) -> str:
    if shape.stages == 0:
        return kernel_name(gpu, f"row_sums_directI{MANGLED[dtype]}E")
    return kernel_name(gpu, f"row_sums_ringI{MANGLED[dtype]}Li{shape.row_lanes}E")


def buffer_of(gpu: Gpu, tensor: Tensor, name: str) -> Any:
    """What lies between the rows is out of bounds; NumPy has no bfloat16, so bits are passed."""
    size = tensor.element_size()
    offset = tensor.storage_offset() * size % 16
    return gpu.buffer(tensor.view(BITS[size]).numpy(), name, align=offset & -offset or 16)


def row_arguments(
    addresses: list[int], before: Tensor, after: Tensor, num_tokens: int, inner: int
) -> bytes:
    """`RowArguments` of row_token.cuh."""
    size = before.element_size()
    strides = [stride * size for states in (before, after) for stride in states.stride()[:2]]
    return struct.pack("<4Q6qi4x", *addresses, *strides, num_tokens, inner, before.shape[-1])


def is_aligned(states: Tensor) -> bool:
    size = states.element_size()
    numbers = [
        states.storage_offset(),
        *(s for n, s in zip(states.shape[:2], states.stride(), strict=False) if n > 1),
    ]
    return all(number * size % 16 == 0 for number in numbers)


@dataclass
class RowSums:
    """One launch of row_sums on hidden states `(outer, inner, hidden_size)`."""

    before: Tensor
    after: Tensor
    mask: Tensor | None = None
    shape: Shape | None = None
    ctas: int = 3  # fewer than the rows need: they go round

    def launch(self, arch: str) -> Tensor:
        """The sums; `report`, `x` and `y` tell of the bytes that were read."""
        gpu = fresh(arch)
        outer, inner, hidden_size = self.before.shape
        aligned = is_aligned(self.before) and is_aligned(self.after)
        dtype = self.before.dtype
        shape = self.shape or Shape.of(outer * inner, hidden_size, dtype, aligned)
        self.x = buffer_of(gpu, self.before, "before")
        self.y = buffer_of(gpu, self.after, "after")
        mask = None if self.mask is None else gpu.buffer(self.mask.view(torch.uint8).numpy())
        sums = torch.empty(outer, inner, 4, dtype=torch.float64)
        out = gpu.buffer(sums.numpy(), "sums", initialised=False)
        addresses = [self.x.address, self.y.address, 0 if mask is None else mask.address]
        arguments = row_arguments(
            [*addresses, out.address], self.before, self.after, outer * inner, inner
        )
        ctas = min(self.ctas, -(-outer * inner // shape.rows))
        shared = 2 * 16 * 32 * shape.warps * shape.stages
        name = ring_name(gpu, dtype, shape)
        self.report: Report = gpu.launch(name, ctas, 32 * shape.warps, [arguments], shared)
        return sums


def fold(
    arch: str,
    sums: Tensor,
    hidden_size: int,
    state: tuple[Tensor, Tensor],
    kinds: Tensor | None = None,
    places: tuple[int, int, int] = (0, 0, 1 << 62),
    apart: bool = False,
) -> Report:
    """One launch of fold: `sums` (layers, outer, inner, 4) into `state` (states, layers, ...)."""
    gpu = fresh(arch, "fold")
    buffers = [gpu.buffer(t.numpy(), n) for t, n in zip((sums, *state), "smt", strict=True)]
    kind = 0 if kinds is None else gpu.buffer(kinds.numpy(), "kinds").address
    num_states, num_layers = state[0].shape[:2]
    numbers = [num_layers, sums.shape[1] * sums.shape[2], hidden_size]
    arguments = struct.pack(
        "<3Q3qQ4qB7x", *(b.address for b in buffers), *numbers, kind, num_states, *places, apart
    )
    name = kernel_name(gpu, "fold_kernel")
    return gpu.launch(name, (num_states, num_layers), 256, [arguments])


def token_metrics(arch: str, sums: Tensor, hidden_size: int, dtype: torch.dtype) -> Tensor:
    """One launch of token_metrics: `(layers, num_metrics, outer, inner)`."""
    gpu = fresh(arch, "fold")
    layers, outer, inner, _ = sums.shape
    out = torch.empty(layers, len(METRICS), outer, inner, dtype=dtype)
    source = gpu.buffer(sums.numpy(), "sums")
    target = gpu.buffer(out.numpy(), "out", initialised=False)
    name = kernel_name(gpu, f"token_metrics_kernelI{'d' if dtype == torch.float64 else 'f'}E")
    gpu.launch(name, (1, layers), 256, [source, outer * inner, hidden_size, target])
    return out


def check_case(arch: str, before: Tensor, after: Tensor, **options: Any) -> RowSums:
    """Sums, metrics and state of every token, each from the kernel before it."""
    run = RowSums(before, after, **options)
    sums = run.launch(arch)[None]
    wide = torch.float64 if before.dtype == torch.float64 else torch.float32
    metrics = token_metrics(arch, sums, before.shape[-1], wide)
    check_metrics(TokenMetrics(*metrics[0].unbind(0)), before, after, short_sums=True)
    state, wanted = empty_state(1, 1), empty_state(1, 1)
    fold(arch, sums, before.shape[-1], state)
    reference.fold(*wanted, sums, before.shape[-1])
    check_state(state, wanted)
    return run


def check_state(state: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    """The same sums were folded: only the order of additions, and fused ones, may differ."""
    assert torch.equal(state[1][..., len(METRICS) :], wanted[1][..., len(METRICS) :])
    assert torch.allclose(state[0], wanted[0], rtol=1e-12, atol=1e-15)
    exact = [METRICS.index(name) for name in ("squared_difference", "norm_before", "norm_after")]
    assert torch.equal(state[1][..., exact], wanted[1][..., exact])


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("case", cases(), ids=str)
def test_case(case: Case, arch: str) -> None:
    before, after = (as_rows(states) for states in case.states())
    check_case(arch, before, after)


def padded_states(tokens: tuple[int, int], hidden_size: int, dtype: torch.dtype, aligned: bool):
    """Near-identical states with a massive channel, gaps between rows and no two tokens alike."""
    generator = torch.Generator().manual_seed(hidden_size)
    build = near((*tokens, hidden_size), 0.01, massive=True, dtype=torch.float64)
    first, second = build(generator)
    share = torch.rand(*tokens, 1, generator=generator, dtype=torch.float64)
    pair = first.to(dtype), torch.lerp(first, second, share).to(dtype)
    gap = (-hidden_size) % 16 + 16 if aligned else 1
    padded = [torch.zeros(tokens[0], tokens[1] + 1, hidden_size + gap, dtype=dtype) for _ in pair]
    for space, values in zip(padded, pair, strict=True):
        space[:, : tokens[1], :hidden_size] = values
    return tuple(space[:, : tokens[1], :hidden_size] for space in padded)


# (sequences, tokens), hidden size: rows of several rounds and of less than one, ends of rows.
SIZES = (((3, 29), 200), ((2, 5), 2056), ((1, 90), 65))


@pytest.mark.parametrize("shape", [*RINGS, DIRECT], ids=str)
@pytest.mark.parametrize("dtype", MANGLED, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_rows(size: tuple[tuple[int, int], int], dtype: torch.dtype, shape: Shape) -> None:
    """Padding is not read, every other byte once; NaN and Inf stay in their rows."""
    tokens, hidden_size = size
    arch = ARCHITECTURES[(hidden_size + shape.stages + shape.warps) % 3]
    if shape != DIRECT:
        hidden_size += -hidden_size % 8  # rows that end between vectors are read directly
    before, after = padded_states(tokens, hidden_size, dtype, aligned=shape != DIRECT)
    mask = torch.rand(tokens, generator=torch.Generator().manual_seed(1)) > 0.2
    mask[0, :2] = mask[-1, -1] = False
    run = RowSums(before, after, mask, shape)
    sums = run.launch(arch)
    wanted = torch.empty_like(sums)
    reference.row_sums(wanted, before, after, mask)
    limit = 1e-14 if dtype == torch.float64 else 13 * 2.0**-24
    assert torch.allclose(sums, wanted, rtol=limit, atol=0)
    assert not bool(sums[~mask].any())
    size_of_row = hidden_size * before.element_size()
    for buffer in (run.x, run.y):
        assert run.report.load_counts(buffer).max() == 1, "a byte was read twice"
        assert run.report.loaded_bytes(buffer) == mask.sum() * size_of_row
        if shape != DIRECT:
            assert run.report.load_widths(buffer) == {128}

    after[-1, 2, 5], before[-1, 3, hidden_size - 1] = torch.nan, torch.inf
    mask[-1, 2:5] = True
    bad = RowSums(before, after, mask, shape).launch(arch)
    assert bad[-1, 2, 1].isnan()
    assert bad[-1, 3, 0].isinf()
    clean = mask.clone()
    clean[-1, 2:4] = False
    reference.row_sums(wanted, before, after, clean)
    assert torch.allclose(bad[clean], wanted[clean], rtol=limit, atol=0)


@pytest.mark.parametrize("shape", [*RINGS, DIRECT], ids=str)
def test_rows_that_need_float64_are_read_again(shape: Shape) -> None:
    """Parallel states that differ by a factor: all of |d| is in the norms. Others are read once."""
    hidden_size = 1032
    before, after = (x.clone() for x in near((2, 40, hidden_size), 0.1)(torch.Generator()))
    again = torch.zeros(2, 40, dtype=torch.bool)
    again[0, 3] = again[1, ::7] = True
    after[again] = 1.5 * before[again] * (1 + 1e-6 * torch.randn(int(again.sum()), hidden_size))
    run = check_case("sm_90", before, after, shape=shape)
    counts = run.report.load_counts(run.x).reshape(2, 40, -1)
    assert (counts.max(-1) == 1 + again.numpy()).all()
    assert (counts.min(-1) == 1 + again.numpy()).all()


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_rows_that_start_unaligned_alike_are_read_wide(arch: str) -> None:
    """Contiguous rows of a size not divisible by 8: only the ends are read entry by entry."""
    before, after = near((2, 4, 1021), 0.1, dtype=torch.bfloat16)(torch.Generator().manual_seed(1))
    run = check_case(arch, before, after)
    assert run.report.load_counts(run.x).max() == run.report.load_counts(run.x).min() == 1
    assert run.report.load_widths(run.x) == {16, 128}
    wide = sum(a.offsets.size for a in run.report._accesses(run.x, False) if a.nbytes == 16)
    assert wide >= 8 * (1021 // 8 - 1)


@pytest.mark.parametrize("shape", RINGS, ids=str)
def test_sums_do_not_depend_on_how_many_blocks_share_the_rows(shape: Shape) -> None:
    """A larger GPU gives the same bits; so do all CTAs at once and one after the other."""
    before, after = padded_states((4, 45), 264, torch.bfloat16, True)
    found = []
    for ctas, at_once in ((1, 256), (2, 1 << 14), (7, 256), (1000, 1 << 14)):
        gpu = compiled("sm_80")
        usual, gpu.max_threads = gpu.max_threads, at_once
        found.append(RowSums(before, after, shape=shape, ctas=ctas).launch("sm_80"))
        gpu.max_threads = usual
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("shape", [RINGS[1], DIRECT], ids=str)
def test_rows_beyond_two_billion_elements(dtype: torch.dtype, shape: Shape) -> None:
    """Three sequences 2^31 - 512 elements apart, of which nothing but one row each exists."""
    far = 2**31 - 512
    before, after = near((3, 1, 576), 0.1, dtype=dtype)(torch.Generator().manual_seed(3))
    gpu, size = fresh("sm_80"), before.element_size()
    addresses = []
    for tensor in (before, after):
        rows = tensor.view(BITS[size]).numpy()
        pieces = {size * far * sequence: rows[sequence, 0] for sequence in range(3)}
        addresses.append(gpu.sparse(size * (2 * far + 576), pieces, "states").address)
    sums = torch.empty(3, 1, 4, dtype=torch.float64)
    addresses += [0, gpu.buffer(sums.numpy(), "sums", initialised=False).address]
    strides = [far * size, 576 * size] * 2
    arguments = struct.pack("<4Q6qi4x", *addresses, *strides, 3, 1, 576)
    shared = 2 * 16 * 32 * shape.warps * shape.stages
    gpu.launch(ring_name(gpu, dtype, shape), 1, 32 * shape.warps, [arguments], shared)
    wanted = torch.empty_like(sums)
    reference.row_sums(wanted, before, after)
    assert torch.allclose(sums, wanted, rtol=1e-6, atol=0)


def test_tokens_beyond_two_billion() -> None:
    """The CTA whose first row is number 2^31, of a sequence of 2^31 + 3 tokens."""
    first, shape = 2**31, Shape(32, 8, 8)
    before, after = near((1, 3, 96), 0.1)(torch.Generator().manual_seed(4))
    gpu = fresh("sm_80")
    num_tokens, row = first + 3, 96 * 4
    addresses = [
        gpu.sparse(num_tokens * row, {first * row: tensor[0].numpy()}, "states").address
        for tensor in (before, after)
    ]
    sums = torch.empty(1, 3, 4, dtype=torch.float64)
    pieces = {32 * first: sums[0].numpy()}
    addresses += [0, gpu.sparse(32 * num_tokens, pieces, "sums", initialised=False).address]
    arguments = struct.pack("<4Q6qi4x", *addresses, 0, row, 0, row, num_tokens, num_tokens, 96)
    last = first // shape.rows
    name = ring_name(gpu, torch.float32, shape)
    gpu.launch(name, last + 1, 32 * shape.warps, [arguments], 2**16, ctas=range(last, last + 1))
    wanted = torch.empty_like(sums)
    reference.row_sums(wanted, before, after)
    assert torch.allclose(sums, wanted, rtol=1e-6, atol=0)


def test_rows_longer_than_their_buffers_are_reported() -> None:
    rows = torch.ones(2, 3, 60)
    gpu = fresh("sm_80")
    addresses = [gpu.buffer(rows.numpy(), name).address for name in ("before", "after")]
    sums = gpu.buffer(np.empty((6, 4)), "sums", initialised=False)
    arguments = struct.pack("<4Q6qi4x", *addresses, 0, sums.address, 720, 240, 720, 240, 6, 3, 64)
    with pytest.raises(FaultError, match="out of bounds"):
        gpu.launch(ring_name(gpu, torch.float32, RINGS[1]), 1, 224, [arguments], 2**16)


def random_sums(layers: int, outer: int, inner: int) -> Tensor:
    """Row sums of plausible states; a few rows are not finite."""
    generator = torch.Generator().manual_seed(layers * outer)
    before, after = near((layers, outer, inner, 24), 0.1)(generator)
    sums = torch.empty(layers, outer, inner, 4, dtype=torch.float64)
    for layer in range(layers):
        reference.row_sums(sums[layer], before[layer], after[layer])
    sums[0, 0, 1, 0], sums[-1, -1, 0, 1] = torch.nan, torch.inf
    return sums


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("places", [(0, 0, 1 << 62), (0, 0, 40), (1, 17, 60), (2, 59, 61)], ids=str)
def test_fold_into_groups(places: tuple[int, int, int], apart: bool) -> None:
    """Two batches of several layers into the states of groups, tokens of a kind kept apart."""
    first, offset, per_state = places
    num_states = first + min((offset + 2 * 350) // per_state, 20) + 2
    state, wanted = empty_state(num_states, 3), empty_state(num_states, 3)
    for batch in range(2):
        sums = random_sums(3, 7, 50)
        generator = torch.Generator().manual_seed(batch)
        kinds = torch.randint(0, APART + apart, (7, 50), generator=generator, dtype=torch.uint8)
        now = first + (offset + 350 * batch) // per_state, (offset + 350 * batch) % per_state
        fold("sm_90", sums, 24, state, kinds, (*now, per_state), apart)
        reference.fold(*wanted, sums, 24, kinds, *now, per_state, apart)
    check_state(state, wanted)
    assert torch.equal(state[1], wanted[1])
    assert bool((state[1][..., -1] == 700).all()), "every state counts all tokens as seen"


def test_of_equal_tokens_the_earliest_counts() -> None:
    sums = torch.tensor([1.0, 2.0, 1.5, 3.0], dtype=torch.float64).expand(1, 30, 50, 4).clone()
    kinds = torch.ones(30, 50, dtype=torch.uint8)
    kinds[0, :4] = 0
    state = empty_state(3, 1)
    for _ in range(2):
        fold("sm_80", sums, 24, state, kinds, (0, 0, 600))
    counts = state[1][:, 0]
    assert counts[:, 0].tolist() == [4, 600, 1200]
    assert counts[:, -3:].tolist() == [[1192, 0, 3000], [1200, 0, 3000], [600, 0, 3000]]
    assert torch.equal(counts[:, : len(METRICS)], counts[:, :1].expand(-1, len(METRICS)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_token_metrics_of_several_layers(dtype: torch.dtype) -> None:
    sums = random_sums(2, 9, 60)
    wanted = reference.metrics_of_sums(sums, 24).transpose(0, 1).to(dtype)
    found = token_metrics("sm_90", sums, 24, dtype)
    assert torch.allclose(
        found, wanted, rtol=1e-6 if dtype == torch.float32 else 1e-12, atol=0, equal_nan=True
    )


@pytest.mark.parametrize("hidden_size", [64, 576, 1024, 4096, 16384])
def test_launches_know_their_kernel(hidden_size: int) -> None:
    for num_tokens in (1, 7, 511, 512, 4096, 16384, 131072, 2**31 + 17):
        for dtype in MANGLED:
            shape = Shape.of(num_tokens, hidden_size, dtype, True)
            assert (shape.row_lanes, shape.stages) in {(r.row_lanes, r.stages) for r in RINGS}
            if shape.row_lanes == 256:  # otherwise most lanes of a CTA would idle
                assert hidden_size * dtype.itemsize >= 4096
            assert Shape.of(num_tokens, hidden_size, dtype, False) == DIRECT


@pytest.mark.parametrize(
    ("num_tokens", "hidden_size", "gpu", "wanted"),
    [
        (8192, 4096, (132, 227 << 10), Shape(32, 8, 16)),  # 62.06 rows: four rounds of 16
        (10000, 4096, (132, 227 << 10), Shape(32, 8, 16)),  # 75.8 rows: five of 16
        (6400, 4096, (132, 227 << 10), Shape(32, 8, 13)),  # 48.5 rows: four of 13
        (8192, 4096, (58, 99 << 10), Shape(32, 8, 12)),  # of 99 KB a ring takes 8
        (2048, 4096, (132, 227 << 10), Shape(32, 8, 8)),  # two rounds rather than one
        (512, 4096, (132, 227 << 10), Shape(32, 8, 4)),
        (8192, 576, (132, 227 << 10), Shape(8, 4, 8, 2)),
        (8192, 576, (108, 163 << 10), Shape(8, 4, 5, 2)),  # 19 fours of rows: two rounds of 10
        (64, 4096, (132, 227 << 10), Shape(256, 8, 8, 2)),
    ],
)
def test_warps_share_the_rows_of_a_multiprocessor_evenly(
    num_tokens: int, hidden_size: int, gpu: tuple[int, int], wanted: Shape
) -> None:
    module = pytest.importorskip("simdiff_kernels._C_cuda", reason="_C_cuda is not built")
    assert Shape(**module.row_shape(num_tokens, hidden_size, "bfloat16", True, *gpu)) == wanted
