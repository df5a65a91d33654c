"""The Triton kernels of accumulate_blocks as compiled, executed without a GPU."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ptx import FaultError, Gpu, Report
from simdiff_kernels import reference
from simdiff_kernels.blocks import empty_block_state
from simdiff_kernels.testing import block_cases, check_token_blocks, walk
from simdiff_kernels.triton.block_partials import (
    JOIN_PAIRS,
    STATES_PER_LAUNCH,
    num_tiles,
    program_words,
)

from .block_updates import BITS, check_state, some_states
from .triton_kernels import Kernel, compile_variants

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}
ALIGNED = [
    {"use": "blocks_masked", "element": element, "aligned": True, "num_states": 10}
    for element in DTYPES
]
UNALIGNED = {"use": "blocks_masked", "element": "bf16", "aligned": False, "num_states": 10}
UNMASKED = {"use": "blocks", "element": "fp32", "aligned": False, "num_states": 10}
FAR = {**UNALIGNED, "wide": True}
COMPANIONS = [{"use": "describe_blocks"}, {"use": "join_blocks"}]
SHORT = 23 / 4 * 2.0**-24  # sums in float32: 23 additions at most


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kernel]:
    everything = [*ALIGNED, UNALIGNED, UNMASKED, FAR, *COMPANIONS]
    return compile_variants("cuda:80", everything, tmp_path_factory.mktemp("ptx"))


@dataclass
class Run:
    """One update: all launches, each by the interpreter."""

    kernels: dict[str, Kernel]
    variant: dict[str, Any]
    states: list[Tensor]
    mask: Tensor | None = None
    tokens_per_program: int = 2
    earlier: tuple[Tensor, Tensor] | None = None
    max_threads: int = 1 << 14
    moments: Tensor = field(init=False)
    tallies: Tensor = field(init=False)

    def launch(self) -> Report:
        """The report of the main kernel."""
        states, first, count = self.states, self.states[0], len(self.states)
        state = self.earlier or empty_block_state(count - 1, torch.device("cpu"))
        self.moments, self.tallies = (part.clone() for part in state)
        outer, inner, hidden_size = first.shape
        programs, words = -(-outer * inner // self.tokens_per_program), program_words(count)
        scratch = np.empty(3 * count + programs * words, np.int64)
        kernel = self.kernels[json.dumps(self.variant)]
        gpu = Gpu(kernel.ptx, max_threads=self.max_threads)
        memory = gpu.memory
        self.buffers = [buffer_of(gpu, h, f"h_{k}") for k, h in enumerate(states)]
        place = gpu.buffer(scratch, "scratch", initialised=False)
        describe, join = (self.kernels[json.dumps(variant)] for variant in COMPANIONS)
        for begin in range(0, count, STATES_PER_LAUNCH):
            some = range(begin, min(begin + STATES_PER_LAUNCH, count))
            numbers = [n for k in some
                       for n in (self.buffers[k].address, *states[k].stride()[:2])]  # fmt: skip
            numbers += [0] * (3 * STATES_PER_LAUNCH - len(numbers))
            other = Gpu(describe.ptx)
            other.memory = memory
            describe.launch(other, 1, [place + 24 * begin, len(some), *numbers])
        arguments: list[Any] = [place, place + 24 * count]
        if self.mask is not None:
            arguments.append(gpu.buffer(self.mask.view(torch.uint8).numpy(), "mask"))
        arguments += [outer * inner, inner, count, hidden_size, self.tokens_per_program, words]
        report = kernel.launch(gpu, programs, arguments)
        other = Gpu(join.ptx)
        other.memory = memory
        parts = [gpu.buffer(self.moments.numpy(), "moments")]
        parts.append(gpu.buffer(self.tallies.numpy(), "tallies"))
        grid = -(-num_tiles(count) * 16 // JOIN_PAIRS)
        sizes = [programs, words, outer * inner, count]
        joined = join.launch(other, grid, [*parts, place + 24 * count, *sizes])
        # Two counts of 32 programs are fewer than the threads, which then share them.
        assert joined.load_counts(place).max() <= 2, "a partial sum was joined twice"
        return report


def buffer_of(gpu: Gpu, tensor: Tensor, name: str) -> Any:
    """What lies between the rows is out of bounds."""
    size = tensor.element_size()
    aligned = all(stride % 16 == 0 for stride in tensor.stride()[:2])
    return gpu.buffer(tensor.view(BITS[size]).numpy(), name, align=256 if aligned else size)


# Numbers of states with several remainders; two slices with a tail for bfloat16.
UPDATES = [
    (ALIGNED[0], 5, (2, 2), 528),
    (ALIGNED[1], 10, (1, 3), 2064),
    (ALIGNED[2], 2, (1, 3), 16),
    (ALIGNED[3], 6, (1, 3), 272),
    (UNALIGNED, 7, (1, 4), 75),
]


@pytest.mark.parametrize("update", UPDATES, ids=["fp32", "bf16", "fp16", "fp64", "unaligned"])
def test_masked_update(kernels: dict[str, Kernel], update: tuple[Any, ...]) -> None:
    variant, num_states, tokens, hidden_size = update
    dtype, gap = DTYPES[variant["element"]], 16 if variant["aligned"] else 1
    states = some_states(num_states, tokens, hidden_size, dtype, gap)
    earlier = empty_block_state(num_states - 1, torch.device("cpu"))
    reference.accumulate_blocks(*earlier, [h * 0.7 for h in states])
    mask = torch.ones(tokens, dtype=torch.bool)
    mask[0, 0] = False
    states[0][-1, -1, hidden_size - 1] = torch.nan
    states[-1][-1, -1, 0] = torch.inf  # the same token, counted once
    wanted = tuple(part.clone() for part in earlier)
    reference.accumulate_blocks(*wanted, states, mask)
    run = Run(kernels, variant, states, mask, earlier=earlier)
    report = run.launch()
    check_state((run.moments, run.tallies), wanted, dtype, SHORT)
    size = states[0].element_size()
    for buffer, state in zip(run.buffers, states, strict=True):
        counts = report.load_counts(buffer)
        # Padding is not read.
        assert (counts > 0).sum() == int(mask.sum()) * hidden_size * size
        # The norms, and each tile with the state: alone it would be read once for each other one.
        assert counts.max() <= 2 + 2 * -(-num_states // 4) + (state is states[-1]) * 8
        assert report.load_widths(buffer) == {128 if variant["aligned"] else 8 * size}


HARD = ("massive", "identical", "opposite", "zero-vectors", "short-first", "large", "small")


@pytest.mark.parametrize("name", [*HARD, "distance-1e-7"])
def test_hard_cases(kernels: dict[str, Kernel], name: str) -> None:
    """Pairs that must be summed in float64, or have a result by definition."""
    case = next(c for c in block_cases((torch.float32,)) if c.name.startswith(name))
    states = [h[1:2, :150][None].contiguous() for h in case.states()]
    run = Run(kernels, UNMASKED, states)
    run.launch()
    assert run.tallies.tolist() == [1, 0, 1]
    check_token_blocks(run.moments, [h[0, 0] for h in states], short_sums=True)


def test_result_does_not_depend_on_the_order_of_programs(kernels: dict[str, Kernel]) -> None:
    states, found = some_states(5, (3, 3), 32, torch.float32, 1), []
    for at_once in (128, 1 << 14):
        run = Run(kernels, UNMASKED, states, tokens_per_program=1, max_threads=at_once)
        run.launch()
        found.append(run.moments)
    assert torch.equal(*found)


def test_tokens_beyond_two_billion(kernels: dict[str, Kernel]) -> None:
    """The last program of a sequence of 2^31 + 3 tokens; of all others nothing exists."""
    first, hidden_size = 2**31, 24
    generator = torch.Generator().manual_seed(4)
    states = [h.bfloat16()[None] for h in walk(2, (3, hidden_size), 0.2)(generator)]
    kernel, words, row = kernels[json.dumps(FAR)], program_words(3), 2 * hidden_size
    gpu = Gpu(kernel.ptx)
    addresses = [
        gpu.sparse((first + 3) * row, {first * row: h.view(torch.int16).numpy()}, "h", align=2)
        for h in states
    ]
    table = np.array([[b.address, 0, hidden_size] for b in addresses], np.int64)
    own = np.empty(words, np.int64)
    mask = gpu.sparse(first + 3, {first: np.ones(3, np.uint8)}, "mask")
    programs = gpu.sparse(16 * words, {8 * words: own}, "programs", initialised=False)
    numbers = [first + 3, first + 3, 3, hidden_size, first, words]
    pointers = [gpu.buffer(table, "table"), programs, mask]
    kernel.launch(gpu, 2, [*pointers, *numbers], blocks=range(1, 2))
    wanted = empty_block_state(2, torch.device("cpu"))
    reference.accumulate_blocks(*wanted, states)
    assert own[6:8].tolist() == [3, 0]
    squared = own[8:].view(np.float64)[16:32]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert squared[i + 4 * j] == pytest.approx(wanted[0][1, i, j].item(), rel=2 * SHORT)


def test_rows_longer_than_their_buffers_are_reported(kernels: dict[str, Kernel]) -> None:
    states = [torch.ones(1, 2, 60) * k for k in range(1, 4)]
    run = Run(kernels, UNMASKED, [h[..., :59] for h in states])
    run.states = states
    original = buffer_of
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            f"{__name__}.buffer_of", lambda gpu, h, name: original(gpu, h[..., :59], name)
        )
        with pytest.raises(FaultError, match="out of bounds"):
            run.launch()
