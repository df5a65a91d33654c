"""Which parts setup.py builds, and that a build that was insisted on fails aloud."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def configure(folder: Path, wanted: str | None, nvcc: str | None) -> subprocess.CompletedProcess:
    """Run setup.py up to where the extensions are known, with this script as the only nvcc."""
    if nvcc is not None:
        (folder / "nvcc").write_text(f"#!/bin/sh\n{nvcc}\n")
        (folder / "nvcc").chmod(0o755)
    dropped = {"SIMDIFF_CUDA", "CUDA_HOME"}
    environment = {key: value for key, value in os.environ.items() if key not in dropped}
    environment["PATH"] = f"{folder}:/usr/bin:/bin"
    if wanted is not None:
        environment["SIMDIFF_CUDA"] = wanted
    code = "import sys; sys.argv = ['setup.py', '--quiet', '--name']; import setup; "
    code += "print([extension.name for extension in setup.extensions()])"
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )


LIBRARIES = """echo '#$ LIBRARIES=  "-L/opt/cuda/lib/stubs" "-L/opt/cuda/lib"' >&2"""


@pytest.mark.parametrize(
    ("wanted", "nvcc", "parts"),
    [
        (None, None, ["_C"]),
        (None, LIBRARIES, ["_C", "_C_cuda"]),
        ("0", LIBRARIES, ["_C"]),
        ("1", LIBRARIES, ["_C", "_C_cuda"]),
        (None, "exit 3", ["_C"]),
    ],
)
def test_parts(tmp_path: Path, wanted: str | None, nvcc: str | None, parts: list[str]) -> None:
    result = configure(tmp_path, wanted, nvcc)
    expected = str([f"simdiff_kernels.{part}" for part in parts])
    assert result.stdout.splitlines()[-1] == expected, result.stderr
    assert ("the CUDA part is left out" in result.stderr) == (nvcc == "exit 3")


@pytest.mark.parametrize(
    ("wanted", "nvcc", "message"),
    [
        ("1", None, "SIMDIFF_CUDA=1, but nvcc is neither on PATH nor in CUDA_HOME/bin"),
        ("1", "exit 3", "returned non-zero exit status 3"),
        ("yes", LIBRARIES, "SIMDIFF_CUDA must be 0 or 1, got 'yes'"),
    ],
)
def test_what_was_insisted_on_fails_aloud(
    tmp_path: Path, wanted: str, nvcc: str | None, message: str
) -> None:
    result = configure(tmp_path, wanted, nvcc)
    assert result.returncode != 0
    assert message in result.stderr
