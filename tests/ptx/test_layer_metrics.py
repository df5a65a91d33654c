"""The Triton kernels as compiled, executed without a GPU: numbers against float64, no faults."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ptx import Buffer, Gpu
from simdiff_kernels import METRICS, TokenMetrics, reference
from simdiff_kernels.metrics import result_dtype
from simdiff_kernels.running import _empty_state as empty_states
from simdiff_kernels.testing import check_metrics, near

ELEMENTS = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# (hidden size, rows aligned to 16 bytes): every configuration, tails, several steps per row.
SHAPES = ((576, True), (1040, True), (3072, True), (33, False), (1500, False))
OUTER, INNER, TILES_PER_PROGRAM = 3, 5, 3


def empty_state(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The state of one layer that has seen nothing."""
    moments, tallies = empty_states(device, 1)
    return moments[0], tallies[0]


def variant(shape: tuple[int, bool], element: str, store: bool) -> dict[str, Any]:
    return {
        "hidden_size": shape[0],
        "aligned": shape[1],
        "element": element,
        "store": store,
        "reduce": not store,
    }


VARIANTS = [
    *(
        variant(s, element, store)
        for s in SHAPES
        for element in ELEMENTS
        for store in (True, False)
    ),
    {"join": True},
]


@dataclass
class Kernel:
    """A compiled kernel and what its launch needs."""

    ptx: str
    name: str
    threads: int
    shared: int

    def launch(self, gpu: Gpu, grid: int, arguments: list[Any]) -> Any:
        """Triton appends two hidden pointers to scratch memory, which is not used."""
        return gpu.launch(self.name, grid, self.threads, [*arguments, None, None], self.shared)


@pytest.fixture(scope="module", params=["cuda:80", "cuda:90"])
def kernels(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Kernel]:
    """All variants for one architecture, compiled once by a process that does not interpret."""
    folder: Path = tmp_path_factory.mktemp("ptx")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    module = [sys.executable, "-m", "simdiff_kernels.triton.compile", "--target", request.param]
    subprocess.run(
        [*module, "--save", str(folder), json.dumps(VARIANTS)], env=environment, check=True
    )
    found = {}
    for index, description in enumerate(VARIANTS):
        info = json.loads((folder / f"{index}.json").read_text())
        text = (folder / f"{index}.ptx").read_text()
        found[json.dumps(description)] = Kernel(
            text, info["kernel"], info["threads"], info["shared"]
        )
    return found


def states(shape: tuple[int, bool], element: str) -> tuple[Tensor, Tensor]:
    """A pair of hidden states with a massive channel and gaps between rows and sequences."""
    hidden_size, aligned = shape
    dtype = ELEMENTS[element]
    generator = torch.Generator().manual_seed(hidden_size)
    build = near((OUTER, INNER, hidden_size), 0.01, massive=True, dtype=torch.float64)
    first, second = build(generator)
    share = torch.rand(OUTER, INNER, 1, generator=generator, dtype=torch.float64)  # no two alike
    pair = first.to(dtype), torch.lerp(first, second, share).to(dtype)
    gap = 16 if aligned else 1
    padded = [torch.zeros(OUTER, INNER + 1, hidden_size + gap, dtype=dtype) for _ in pair]
    for space, values in zip(padded, pair, strict=True):
        space[:, :INNER, :hidden_size] = values
    before, after = (space[:, :INNER, :hidden_size] for space in padded)
    return before, after


def buffer_of(gpu: Gpu, tensor: Tensor, name: str, aligned: bool) -> Buffer:
    """What lies between the rows is out of bounds; NumPy has no bfloat16, so bits are passed."""
    size = tensor.element_size()
    return gpu.buffer(tensor.view(BITS[size]).numpy(), name, align=256 if aligned else size)


def strides(before: Tensor, after: Tensor) -> list[int]:
    return [before.stride(0), before.stride(1), after.stride(0), after.stride(1)]


@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_token_metrics(kernels: dict[str, Kernel], shape: tuple[int, bool], element: str) -> None:
    kernel = kernels[json.dumps(variant(shape, element, store=True))]
    before, after = states(shape, element)
    gpu = Gpu(kernel.ptx)
    x, y = buffer_of(gpu, before, "before", shape[1]), buffer_of(gpu, after, "after", shape[1])
    tokens = OUTER * INNER
    out = torch.empty(len(METRICS), OUTER, INNER, dtype=result_dtype(before.dtype))
    result = gpu.buffer(out.numpy(), "out", initialised=False)
    report = kernel.launch(
        gpu, tokens, [x, y, result, tokens, INNER, shape[0], *strides(before, after), 1]
    )
    check_metrics(TokenMetrics(*out.unbind(0)), before, after)
    for buffer, tensor in ((x, before), (y, after)):
        bytes_of_rows = report.load_counts(buffer)
        assert bytes_of_rows.max() == 1, "a byte was loaded twice"
        assert bytes_of_rows.sum() == tensor.numel() * tensor.element_size()
        if shape[1]:
            assert report.load_widths(buffer) == {128}


@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accumulate(kernels: dict[str, Kernel], shape: tuple[int, bool], element: str) -> None:
    main = kernels[json.dumps(variant(shape, element, store=False))]
    before, after = states(shape, element)
    earlier = before.double() / 2, after.double() / 2.5  # no maximum equal to one to come
    mask = torch.ones(OUTER, INNER, dtype=torch.bool)
    mask[0, :2] = mask[2, 4] = False
    moments, tallies = empty_state(torch.device("cpu"))
    reference.accumulate(moments, tallies, *earlier)
    after[1, 2, 5] = torch.nan
    wanted = moments.clone(), tallies.clone()
    reference.accumulate(*wanted, before, after, mask)

    gpu, tokens = Gpu(main.ptx), OUTER * INNER
    x, y = buffer_of(gpu, before, "before", shape[1]), buffer_of(gpu, after, "after", shape[1])
    tokens_per_tile = 2 if shape[0] <= 1024 else 1
    programs = -(-tokens // (tokens_per_tile * TILES_PER_PROGRAM))
    partials = np.empty((programs, 3, 8)), np.empty((programs, 2, 8), np.int64)
    arguments: list[Any] = [x, y, gpu.buffer(mask.view(torch.uint8).numpy(), "mask")]
    arguments += [gpu.buffer(partial, "partial", initialised=False) for partial in partials]
    arguments += [tokens, INNER, shape[0], *strides(before, after), TILES_PER_PROGRAM]
    report = main.launch(gpu, programs, arguments)
    assert report.load_counts(x).max() == 1
    assert report.loaded_bytes(x) == mask.sum() * shape[0] * before.element_size()

    join = kernels[json.dumps({"join": True})]
    gpu = Gpu(join.ptx)
    named = {"moments": moments, "tallies": tallies}
    arguments = [gpu.buffer(tensor.numpy(), name) for name, tensor in named.items()]
    arguments += [gpu.buffer(partial, "partial") for partial in partials]
    join.launch(gpu, 1, [*arguments, programs, tokens])
    assert torch.equal(tallies, wanted[1])
    assert torch.allclose(moments, wanted[0], rtol=1e-13, atol=0)


def test_rows_beyond_two_billion_elements(kernels: dict[str, Kernel]) -> None:
    """Three sequences 2^31 - 512 elements apart, of which nothing but one row each exists."""
    shape, far = (576, True), 2**31 - 512
    kernel = kernels[json.dumps(variant(shape, "bf16", store=True))]
    before, after = (tensor[:, 0].contiguous() for tensor in states(shape, "bf16"))
    gpu = Gpu(kernel.ptx)
    buffers = []
    for tensor in (before, after):
        rows = tensor.view(torch.int16).numpy()
        pieces = {2 * far * sequence: rows[sequence] for sequence in range(OUTER)}
        buffers.append(gpu.sparse(2 * (2 * far + 576), pieces, "states"))
    out = torch.empty(len(METRICS), OUTER)
    result = gpu.buffer(out.numpy(), "out", initialised=False)
    arguments = [*buffers, result, OUTER, 1, 576, far, 576, far, 576, 1]
    kernel.launch(gpu, 2, arguments)
    check_metrics(TokenMetrics(*out.unbind(0)), before, after)
