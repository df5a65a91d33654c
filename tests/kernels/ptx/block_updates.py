"""One update of all blocks by the CUDA kernels: its states, its launches, what it must give."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ptxcheck import Gpu, Report
from ptxcheck.compilers import nvcc_ptx
from simdiff_kernels import BLOCK_METRICS, reference
from simdiff_kernels.testing import check_token_blocks, exact_block_metrics, walk

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # NumPy has no bfloat16: bits are passed


def some_states(
    num_states: int, tokens: tuple[int, int], hidden_size: int, dtype: torch.dtype, gap: int
) -> list[Tensor]:
    """A walk with a massive activation that comes and goes; each state has strides of its own."""
    generator = torch.Generator().manual_seed(hidden_size)
    found = []
    for k, h in enumerate(walk(num_states - 1, (*tokens, hidden_size), 0.2)(generator)):
        if 0 < k < num_states - 1:
            h[..., hidden_size // 3] *= 30
        space = torch.zeros(tokens[0], tokens[1] + k % 3, hidden_size + gap * (k + 1), dtype=dtype)
        space[:, : tokens[1], :hidden_size] = h
        found.append(space[:, : tokens[1], :hidden_size])
    return found


def check_state(
    found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor], dtype: torch.dtype, short: float
) -> None:
    """Moments and counts; `short` is the relative error that sums in float32 have."""
    assert torch.equal(found[1], wanted[1])
    limit = 1e-12 if dtype == torch.float64 else 2 * short
    rest = torch.ones_like(wanted[0], dtype=torch.bool)
    for name in ("cosine_distance", "angular_distance"):  # magnified by up to 16
        index = BLOCK_METRICS.index(name)
        rest[..., [index, len(BLOCK_METRICS) + index], :, :] = False
    assert torch.allclose(found[0][rest], wanted[0][rest], rtol=limit, atol=0)
    assert torch.allclose(found[0][~rest], wanted[0][~rest], rtol=16 * limit, atol=0)


CSRC = Path(__file__).resolve().parents[3] / "csrc" / "cuda"


MANGLED = {
    torch.float32: "IfL",
    torch.float64: "IdL",
    torch.bfloat16: "INS_8BFloat16EL",
    torch.float16: "INS_7Float16EL",
}


MAX_STATES, THREADS, WARPS, FOLD_THREADS, FOLD_PAIRS = 160, 256, 8, 256, 4
STEP_BYTES, UNIT_SUMS = 128, 96
ABSOLUTE = BLOCK_METRICS.index("absolute_difference")


# Sums of a few dozen terms in float32 (csrc/cuda/block_tiles.cuh): 67 additions at most, whose
# errors do not all point the same way.
SHORT = 67 / 4 * 2.0**-24


@cache
def compiled(source: str, arch: str) -> Gpu:
    """All kernels of a file for one architecture, parsed and bound once."""
    return Gpu(nvcc_ptx(f'#include "{CSRC / source}"\n', arch, "-std=c++17", "-O3"))


def kernel_name(gpu: Gpu, *parts: str) -> str:
    (name,) = [name for name in gpu.programs if all(part in name for part in parts)]
    return name


def num_units(num_states: int, steps: int) -> int:
    """Counts the units of csrc/cuda/block_layout.h."""
    groups = -(-(num_states - 1) // 4)
    quads = -(-groups * (groups - 1) // 2 // 4) + -(-groups // 4)
    left, bits = quads % WARPS, 0
    while left not in (0, 7) and (bits == 0 or (left << bits) % 4) and 2 << bits <= steps:
        bits += 1
    return quads - left + (left << bits)


def empty_state(num_running: int, num_states: int) -> tuple[Tensor, Tensor]:
    moments = torch.zeros(num_running, 11, num_states, num_states, dtype=torch.float64)
    return moments, torch.zeros(num_running, 3, dtype=torch.int64)


@dataclass
class Run:
    """One update by hidden states `(outer, inner, hidden_size)`."""

    states: Sequence[Tensor]
    kinds: Tensor | None = None
    places: tuple[int, int, int] = (0, 0, 1 << 62)  # first state, offset, tokens per state
    num_running: int = 1
    absolute: bool = False
    wants_sums: bool = True
    at_once: int = 1 << 30
    tokens_per_cta: int = 2
    slice_bytes: int = 256
    earlier: tuple[Tensor, Tensor] | None = None
    arch: str = "sm_80"
    sums: Tensor | None = None
    reports: list[Report] = field(default_factory=list)  # of block_sums_kernel

    def __post_init__(self) -> None:
        state = self.earlier or empty_state(self.num_running, len(self.states))
        self.moments, self.counts = (part.clone() for part in state)
        self.dtype = self.states[0].dtype
        self.outer, self.inner, self.hidden_size = self.states[0].shape
        self.num_tokens = self.outer * self.inner
        if self.wants_sums:
            shape = (len(self.states) - 1, self.outer, self.inner, 4)
            self.sums = torch.full(shape, torch.nan, dtype=torch.float64)

    def reference(self) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
        state = self.earlier or empty_state(self.num_running, len(self.states))
        state = tuple(part.clone() for part in state)
        sums = None if self.sums is None else torch.empty_like(self.sums)
        reference.accumulate_blocks(
            *state, self.states, self.kinds, *self.places, self.absolute, sums
        )
        return state, sums

    def launch(self) -> Run:
        for first in range(0, self.num_tokens, self.at_once):
            self._launch(first, min(self.num_tokens, first + self.at_once))
        return self

    def _launch(self, first: int, last: int) -> None:
        num_states, count = len(self.states), last - first
        num_ctas = -(-count // self.tokens_per_cta)
        units = num_units(num_states, self.slice_bytes // STEP_BYTES) * (1 + self.absolute)
        num_pairs = num_states * (num_states - 1) // 2
        norms, pairs = np.empty((count, num_states)), np.empty((count, num_pairs, 2))
        unit_sums, absolute = np.empty((num_ctas, units, UNIT_SUMS)), np.empty((count, num_pairs))

        gpu = compiled("block_sums.cu", self.arch)
        gpu.memory = type(gpu.memory)()
        self.buffers = [buffer_of(gpu, h, f"h_{k}") for k, h in enumerate(self.states)]
        tokens = [first, last]
        tokens += [
            gpu.buffer(a, n, initialised=False).address
            for a, n in ((norms, "norms"), (pairs, "pairs"))
        ]
        wanted = gpu.buffer(absolute, "absolute", initialised=False) if self.absolute else None
        tokens += [address_of(wanted)]
        kinds = None if self.kinds is None else gpu.buffer(self.kinds.numpy(), "kinds")
        sums = None if self.sums is None else gpu.buffer(self.sums.numpy(), "sums")
        scratch = gpu.buffer(unit_sums, "unit_sums", initialised=False)
        pointers = [address_of(p) for p in (kinds, sums, scratch)]
        row_bytes = self.hidden_size * self.dtype.itemsize
        arguments = pack_sums(
            self.buffers,
            self.states,
            pointers,
            tokens,
            [self.num_tokens, self.inner, row_bytes],
            [self.tokens_per_cta, num_states, self.slice_bytes, units],
        )
        name = kernel_name(gpu, MANGLED[self.dtype], f"Lb{int(self.absolute)}E")
        shared = 2 * num_states * self.slice_bytes
        self.reports.append(gpu.launch(name, num_ctas, THREADS, [arguments], shared))

        gpu = compiled("block_fold.cu", self.arch)
        gpu.memory = type(gpu.memory)()
        tokens = [first, last] + [
            gpu.buffer(a, n, read_only=True).address
            for a, n in ((norms, "norms"), (pairs, "pairs"))
        ]
        tokens += [gpu.buffer(absolute, "absolute").address if self.absolute else 0]
        kinds = None if self.kinds is None else gpu.buffer(self.kinds.numpy(), "kinds")
        first_state, offset, tokens_per_state = self.places
        lowest = max(0, first_state + (offset + first) // tokens_per_state)
        end = min(self.num_running, first_state + (offset + last - 1) // tokens_per_state + 1)
        pair_ctas = -(-num_pairs // FOLD_PAIRS)
        arguments = struct.pack(
            "<Q4q?7x2q3Q2Q3q2i",
            address_of(kinds),
            self.num_running,
            *self.places,
            False,
            *tokens,
            gpu.buffer(self.moments.numpy(), "moments").address,
            gpu.buffer(self.counts.numpy(), "counts").address,
            self.num_tokens,
            self.hidden_size,
            lowest,
            num_states,
            pair_ctas,
        )
        name = kernel_name(gpu, "block_fold_kernel")
        gpu.launch(name, max(1, end - lowest) * pair_ctas, FOLD_THREADS, [arguments])

    def check(self) -> None:
        """The state and the row sums against the reference."""
        state, _ = self.reference()
        check_state((self.moments, self.counts), state, self.dtype, SHORT)
        self.check_sums()

    def check_sums(self) -> None:
        _, sums = self.reference()
        if sums is not None:
            # y^2 = x^2 + 2 x d + d^2 may be a quarter of x^2: then it is less exact by as much.
            limit = 1e-13 if self.dtype == torch.float64 else 4 * SHORT
            assert torch.allclose(self.sums, sums, rtol=limit, atol=0, equal_nan=True)


def address_of(buffer) -> int:
    return 0 if buffer is None else buffer.address


def pack_sums(buffers, states, pointers, tokens, numbers, sizes) -> bytes:
    """`BlockArguments` of block_token.cuh."""
    rows = [(b.address, *h.stride()[:2]) for b, h in zip(buffers, states, strict=True)]
    flat = [number for row in rows for number in row] + [0] * 3 * (MAX_STATES - len(rows))
    return struct.pack(f"<{3 * MAX_STATES}q3Q2q3Q3q4i", *flat, *pointers, *tokens, *numbers, *sizes)


def buffer_of(gpu: Gpu, tensor: Tensor, name: str):
    """What lies between the rows is out of bounds."""
    size = tensor.element_size()
    offset = tensor.storage_offset() * size % 16
    return gpu.buffer(tensor.view(BITS[size]).numpy(), name, align=offset & -offset or 256)


def check_exactly(run: Run) -> None:
    """One token against the exact metrics of all pairs."""
    rows = [h[0, 0] for h in run.states]
    moments = run.moments[0].clone()
    if not run.absolute:
        assert not moments[[ABSOLUTE, len(BLOCK_METRICS) + ABSOLUTE]].any()
        for j in range(len(rows)):
            for i in range(j):
                exact = exact_block_metrics(rows[i], rows[j])["absolute_difference"]
                moments[ABSOLUTE, i, j] = exact
                moments[len(BLOCK_METRICS) + ABSOLUTE, i, j] = exact**2
    check_token_blocks(moments, rows, short_sums=True)
