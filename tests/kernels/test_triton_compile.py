"""Every Triton configuration: compiled for GPUs that are not here, and run by the interpreter."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from simdiff_kernels import reference
from simdiff_kernels.testing import SHORT_SUMS, near, with_strides
from simdiff_kernels.triton import row_sums
from simdiff_kernels.triton.row_sums import (
    CONFIGURATIONS,
    THREADS,
    UNALIGNED,
    configuration,
    rows_are_aligned,
)
from triton_compile import ELEMENT_TYPES, variants

TOOL = Path(__file__).resolve().parents[2] / "tools" / "triton_compile.py"
# 65536 registers of a multiprocessor: with 80 six programs of 128 threads are resident, of which
# each waits for 24 KB.
MAX_REGISTERS = 80
SHARED_MEMORY = 29 * 1024  # of a program, 1 KB of it reserved: five of them on an A100, of 164 KB
DTYPES = {8: [torch.float64], 4: [torch.float32], 2: [torch.bfloat16, torch.float16]}


def compile_ahead_of_time(target: str) -> list[dict[str, Any]]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, TOOL, "--target", target]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    reports = [json.loads(line) for line in result.stdout.splitlines()]
    for report, variant in zip(reports, variants(), strict=True):
        assert variant.items() <= report.items()
        report["row"] = variant["kernel"] == "row_sums" and configuration(
            variant["hidden_size"], ELEMENT_TYPES[variant["element"]], variant["aligned"]
        )
    return reports


def count(opcodes: dict[str, int], pattern: str) -> int:
    return sum(number for opcode, number in opcodes.items() if re.match(pattern, opcode))


FLOAT64 = r"D(ADD|MUL|FMA|SETP|MNMX)|F2F\.(F64|F32\.F64)|I2F\.F64|MUFU\.\w+64"


@pytest.mark.parametrize("target", ["cuda:80", "cuda:90"])
def test_machine_code(target: str) -> None:
    """What the design counts on: float32 per entry, wide copies far ahead, few registers."""
    for report in compile_ahead_of_time(target):
        assert report["local"] == report["stack"] == 0, report
        assert count(report["opcodes"], "LDL|STL") == 0, report  # nothing is spilled
        assert count(report["opcodes"], r"(ATOM\w*|RED)\.") == 0, report
        if report["kernel"] == "row_sums":
            check_row_sums(report)
        else:
            assert 2 * report["registers"] * report["threads"] <= 65536, report


def check_row_sums(report: dict[str, Any]) -> None:
    row, loop, size = report["row"], report["loops"][0], ELEMENT_TYPES[report["element"]]
    assert report["threads"] == THREADS
    assert report["registers"] <= MAX_REGISTERS, report
    assert report["shared"] <= SHARED_MEMORY, report
    entries = row.vectors * row.entries  # of each input, in a step
    if report["element"] == "fp64":
        assert count(loop, "DFMA") == 3 * entries, report
    else:
        # Three fused sums of each entry, and no float64 at all: at most 12 operations for two
        # vectors of 16 bytes would do where it runs at 1/64 of float32.
        assert count(loop, "FFMA") == 3 * entries, report
        assert count(loop, FLOAT64) == 0, report
    if report["aligned"]:  # one copy of each input, and the copies of the next steps
        assert count(loop, r"LDGSTS\S*\.128") == count(loop, r"LDG(STS)?\.") == 2, report
        assert report["copies_ahead"] == 2 * (row.stages - 2), report
    else:
        copied = "LDGSTS" if size > 2 else "LDG"
        assert count(loop, rf"{copied}\.") == 2 * row.vectors, report


def test_compiles_for_amd() -> None:
    """AMD's resource report comes with their tools, not here."""
    for report in compile_ahead_of_time("hip:gfx942"):
        assert report["threads"] == (THREADS if report["row"] else 256)


def test_refuses_the_interpreter() -> None:
    result = subprocess.run(
        [sys.executable, TOOL],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    assert "unset TRITON_INTERPRET" in result.stderr


def test_a_program_has_a_thread_for_each_lane_of_its_rows() -> None:
    for row in (*(row[1:3] for row in CONFIGURATIONS), UNALIGNED[:2]):
        assert row[0] * row[1] == THREADS


def rows() -> list[Any]:
    """A hidden size in each row of the table: several steps and a tail, for every dtype."""
    found = []
    for size, dtypes in DTYPES.items():
        for first in (0, *(row[0] for row in CONFIGURATIONS[:-1])):
            for dtype in dtypes:
                hidden_size = (first or 1000) // size // 16 * 16 + 16
                found.append(pytest.param(hidden_size, True, dtype, id=f"{hidden_size}-{dtype}"))
        found += [pytest.param(1, False, dtype, id=f"1-{dtype}") for dtype in dtypes]
        found += [pytest.param(1333, False, dtype, id=f"1333-{dtype}") for dtype in dtypes]
    return found


def states(hidden_size: int, aligned: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Six tokens with a massive channel, one of which needs float64; sequences lie apart."""
    build = near((2, 3, hidden_size), 1e-3, massive=True, dtype=dtype)
    before, after = build(torch.Generator().manual_seed(hidden_size))
    after[0, 1] = 1.5 * before[0, 1]
    unit = 16 if aligned else 1
    pair = [torch.full((2, 4, hidden_size + unit), torch.nan, dtype=dtype) for _ in range(2)]
    views = [space[:, :3, unit:] for space in pair]
    return views[0].copy_(before), views[1].copy_(after)


@pytest.mark.parametrize(("hidden_size", "aligned", "dtype"), rows())
def test_every_configuration(hidden_size: int, aligned: bool, dtype: torch.dtype) -> None:
    """On the GPU if there is one, else under Triton's interpreter."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    before, after = states(hidden_size, aligned, dtype)
    mask = torch.tensor([[True, True, False], [True, False, True]])
    wanted = torch.empty(2, 3, 4, dtype=torch.float64)
    for some in (None, mask):
        pair = [with_strides(tensor, device) for tensor in (before, after)]
        assert rows_are_aligned(*pair) == aligned
        sums = torch.full_like(wanted, torch.nan).to(device)
        row_sums(sums, *pair, None if some is None else some.to(device))
        reference.row_sums(wanted, before, after, some)
        limit = 1e-13 if dtype == torch.float64 else SHORT_SUMS
        assert torch.allclose(sums.cpu(), wanted, rtol=limit, atol=0)
        assert torch.allclose(sums[0, 1].cpu(), wanted[0, 1], rtol=1e-13, atol=0)


def test_alignment_of_every_number_counts() -> None:
    """One address, size or stride that is no multiple of 16 bytes makes the rows unaligned."""
    space = torch.zeros(4 * 64 * 64 + 16, dtype=torch.bfloat16)
    aligned = space.as_strided((2, 2, 32), (64, 32, 1))
    assert rows_are_aligned(aligned, aligned)
    assert rows_are_aligned(aligned, space.as_strided((2, 2, 32), (72, 40, 1), 8))
    for numbers in ((28, 64, 32, 0), (32, 68, 32, 0), (32, 64, 36, 0), (32, 64, 32, 4)):
        hidden_size, outer_stride, inner_stride, offset = numbers
        strides = (outer_stride, inner_stride, 1)
        other = space.as_strided((2, 2, hidden_size), strides, offset)
        assert not rows_are_aligned(other, other)
        if hidden_size == 32:
            assert not rows_are_aligned(aligned, other)
            assert not rows_are_aligned(other, aligned)


def test_short_sums_stay_short() -> None:
    """Terms whose last bits a sum of more than some 32 of them drops, all in the same direction."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    states = torch.full((1, 1, 1 << 17), (1 + 0.99 * 2.0**-17) ** 0.5, device=device)
    sums, wanted = torch.empty(2, 1, 1, 4, dtype=torch.float64, device=device)
    row_sums(sums, states, states)
    reference.row_sums(wanted, states, states)
    assert torch.allclose(sums, wanted, rtol=SHORT_SUMS, atol=0)
