"""The Triton kernels compiled for GPUs that are not here: wide loads, no spills, few registers."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

# 65536 registers a multiprocessor, 2048 threads: 64 registers a thread leave half of them.
MAX_REGISTERS = {"fp32": 80, "bf16": 72, "fp16": 72, "fp64": 104}


@pytest.mark.parametrize("target", ["cuda:80", "cuda:90", "hip:gfx942"])
def test_compiles_ahead_of_time(target: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-m", "simdiff_kernels.triton.compile", "--target", target],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    reports = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(reports) == 24
    if target.startswith("hip"):
        return  # AMD's resource report comes with their tools, which are not here
    for report in reports:
        wide = [bits for bits in report["load_bits"] if bits != 8]  # 8 bits: the mask
        assert wide == [128], report
        assert report["local"] == report["stack"] == 0, report
        assert report["registers"] <= MAX_REGISTERS[report["element"]], report


def test_refuses_the_interpreter() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "simdiff_kernels.triton.compile"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    assert "unset TRITON_INTERPRET" in result.stderr
