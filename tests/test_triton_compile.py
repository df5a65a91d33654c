"""Every Triton configuration: compiled for GPUs that are not here, and run by the interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from simdiff_kernels import METRICS, TokenMetrics, reference
from simdiff_kernels.blocks import empty_block_state
from simdiff_kernels.metrics import result_dtype
from simdiff_kernels.running import _empty_state as empty_states
from simdiff_kernels.testing import check_metrics, near, walk, with_strides
from simdiff_kernels.triton import block_metrics, block_partials, layer_metrics
from simdiff_kernels.triton.compile import ELEMENT_TYPES, USES, variants
from simdiff_kernels.triton.configurations import CONFIGURATIONS, configuration
from simdiff_kernels.triton.partials import SCRATCH_WORDS

# 65536 registers and 2048 threads a multiprocessor: with 64 a thread half of them are resident.
MAX_REGISTERS = 64
DTYPES = {8: [torch.float64], 4: [torch.float32], 2: [torch.bfloat16, torch.float16]}


def compile_ahead_of_time(target: str, *uses: str) -> list[dict[str, Any]]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "simdiff_kernels.triton.compile", "--target", target]
    result = subprocess.run(
        [*command, "--uses", *uses], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    reports = [json.loads(line) for line in result.stdout.splitlines()]
    for report, variant in zip(reports, variants(uses), strict=True):
        assert variant.items() <= report.items()
    return reports


@pytest.mark.parametrize("target", ["cuda:80", "cuda:90"])
def test_registers_and_loads(target: str) -> None:
    disassembled = 0
    for report in compile_ahead_of_time(target, *USES, "join"):
        assert report["local"] == report["stack"] == 0, report
        if report["use"] == "join":  # a single program, which need not share its multiprocessor
            assert report["registers"] * report["threads"] <= 65536, report
            continue
        assert report["threads"] == 128
        assert report["registers"] <= MAX_REGISTERS, report
        mask = [8] if "masked" in report["use"] else []
        bits = 128 if report["aligned"] else 8 * ELEMENT_TYPES[report["element"]]
        assert report["load_bits"] == [*mask, bits], report
        if "sass" in report:
            row = configuration(report["hidden_size"], ELEMENT_TYPES[report["element"]], True)
            assert set(report["sass"]) == {"LDG.E.128"}, report  # no LDL, STL: nothing is spilled
            # One load of each input per vector; ptxas may unroll the loop.
            assert report["sass"]["LDG.E.128"] % (2 * row.vectors) == 0, report
            disassembled += 1
    assert disassembled == sum(len(CONFIGURATIONS[size]) for size in ELEMENT_TYPES.values())


def test_compiles_for_amd() -> None:
    """The kernel that does everything; AMD's resource report comes with their tools, not here."""
    reports = compile_ahead_of_time("hip:gfx942", "accumulate_masked_keep_tokens", "join")
    assert [report["threads"] for report in reports] == [128] * (len(reports) - 1) + [512]


def test_refuses_the_interpreter() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "simdiff_kernels.triton.compile"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    assert "unset TRITON_INTERPRET" in result.stderr


def rows() -> list[Any]:
    """A hidden size in each row of the table: several steps and a tail, for every dtype."""
    found = []
    for size, table in CONFIGURATIONS.items():
        for first in (1, *(row[0] + 1 for row in table[:-1])):
            for aligned in (True, False):
                hidden_size = (first + 15 if aligned else first + 2) if first > 1 else 400
                for dtype in DTYPES[size]:
                    name = f"{first}-{'' if aligned else 'un'}aligned-{dtype}"
                    found.append(pytest.param(hidden_size, aligned, dtype, id=name))
    return found


def states(hidden_size: int, aligned: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Six tokens with a massive channel, the third masked by the tests, two of them equal."""
    build = near((2, 3, hidden_size), 1e-3, massive=True, dtype=dtype)
    before, after = build(torch.Generator().manual_seed(hidden_size))
    before[0, 2], after[0, 2] = 3 * before[0, 2], -2 * after[0, 2]
    before[1, 2], after[1, 2] = before[0, 1], after[0, 1]
    if aligned:
        return before, after
    pair = [torch.empty(2, 3, hidden_size + 1, dtype=dtype) for _ in range(2)]
    views = [space[..., 1:] for space in pair]  # rows that start in the middle of 16 bytes
    return views[0].copy_(before), views[1].copy_(after)


@pytest.mark.parametrize(("hidden_size", "aligned", "dtype"), rows())
def test_every_configuration(hidden_size: int, aligned: bool, dtype: torch.dtype) -> None:
    """On the GPU if there is one, else under Triton's interpreter."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    before, after = states(hidden_size, aligned, dtype)
    x, y = with_strides(before, device), with_strides(after, device)
    assert layer_metrics._rows_are_aligned(x, y) == aligned
    check_metrics(TokenMetrics(*layer_metrics.token_metrics(x, y).cpu().unbind(0)), before, after)

    mask = torch.ones(2, 3, dtype=torch.bool)
    mask[0, 2] = False
    moments, tallies = (part[0] for part in empty_states(torch.device("cpu"), 1))
    state = moments.to(device), tallies.to(device)
    kept = torch.empty(len(METRICS), 2, 3, device=device, dtype=result_dtype(dtype))
    scratch = torch.zeros(SCRATCH_WORDS, dtype=torch.int64, device=device)
    layer_metrics.accumulate(*state, x, y, None, None, scratch)
    layer_metrics.accumulate(*state, x, y, mask.to(device), kept, scratch)  # used once more
    reference.accumulate(moments, tallies, before, after)
    reference.accumulate(moments, tallies, before, after, mask)
    assert torch.equal(state[1].cpu(), tallies)
    assert torch.allclose(state[0].cpu(), moments, rtol=1e-12, atol=0)
    wanted = reference.token_metrics(before.double(), after.double())
    assert torch.allclose(kept.cpu().double(), wanted, rtol=1e-7, atol=0)


def test_alignment_of_every_number_counts() -> None:
    """One address, size or stride that is no multiple of 16 makes the rows unaligned."""
    aligned = torch.zeros(4 * 64 * 64 + 16).as_strided((2, 2, 32), (64, 32, 1))
    assert layer_metrics._rows_are_aligned(aligned, aligned)
    for numbers in ((24, 64, 32, 0), (32, 72, 32, 0), (32, 64, 40, 0), (32, 64, 32, 1)):
        hidden_size, outer_stride, inner_stride, offset = numbers
        strides = (outer_stride, inner_stride, 1)
        other = aligned.as_strided((2, 2, hidden_size), strides, offset)
        assert not layer_metrics._rows_are_aligned(other, other)
        if hidden_size == 32:
            assert not layer_metrics._rows_are_aligned(aligned, other)
            assert not layer_metrics._rows_are_aligned(other, aligned)


def test_scratch_that_is_too_small() -> None:
    x = torch.ones(1, 2, 8)
    moments, tallies = (part[0] for part in empty_states(torch.device("cpu"), 1))
    scratch = torch.zeros(SCRATCH_WORDS - 1, dtype=torch.int64)
    with pytest.raises(ValueError, match=f"at least {SCRATCH_WORDS} entries.*{SCRATCH_WORDS - 1}"):
        layer_metrics.accumulate(moments, tallies, x, x, None, None, scratch)
    assert int(tallies[-1]) == 0


@pytest.mark.parametrize("target", ["cuda:80", "cuda:90"])
def test_all_blocks_fit_their_registers(target: str) -> None:
    uses = ("blocks_masked", "describe_blocks", "join_blocks")
    for report in compile_ahead_of_time(target, *uses):
        assert report["local"] == report["stack"] == 0, report  # nothing is spilled
        if report["use"] != "blocks_masked":
            continue
        # Three programs of 128 threads on a multiprocessor, two for float64 states.
        programs = 2 if report["element"] == "fp64" else 3
        assert report["threads"] == 128
        assert programs * report["threads"] * report["registers"] <= 65536, report
        bits = 128 if report["aligned"] else 8 * ELEMENT_TYPES[report["element"]]
        assert report["load_bits"] == sorted({8, 64, bits}), report  # mask, addresses and sums


def test_all_blocks_compile_for_amd() -> None:
    reports = compile_ahead_of_time("hip:gfx942", "describe_blocks", "join_blocks")
    assert [report["threads"] for report in reports] == [64, 128]


def test_scratch_of_all_blocks_that_is_too_small() -> None:
    states = [torch.ones(1, 2, 8)] * 3
    moments, tallies = empty_block_state(2, torch.device("cpu"))
    wanted = block_partials.scratch_words(3)
    scratch = torch.zeros(wanted - 1, dtype=torch.int64)
    with pytest.raises(ValueError, match=f"at least {wanted} entries for 3 states, got"):
        block_metrics.accumulate_blocks(moments, tallies, states, None, scratch)
    assert int(tallies[-1]) == 0


def test_many_programs_share_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """More tokens than programs; 40 programs are joined in two rounds; scratch is used again."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    monkeypatch.setattr(block_metrics, "max_programs", lambda num_states: 40)
    states = [h.float().to(device) for h in walk(2, (3, 29, 24), 0.2)(torch.Generator())]
    mask = torch.rand(3, 29, generator=torch.Generator().manual_seed(2)) > 0.3
    found, wanted = (empty_block_state(2, torch.device(device)) for _ in range(2))
    words = block_partials.scratch_words(3)
    scratch = torch.full((words,), -1, dtype=torch.int64, device=device)
    for _ in range(2):
        block_metrics.accumulate_blocks(*found, states, mask.to(device), scratch)
        reference.accumulate_blocks(*wanted, states, mask.to(device))
    assert torch.equal(found[1], wanted[1])
    assert torch.allclose(found[0], wanted[0], rtol=1e-6, atol=0)
