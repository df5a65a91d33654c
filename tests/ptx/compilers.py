"""Gets PTX out of nvcc and Triton."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path


def find_nvcc() -> str | None:
    """The path of nvcc, if it is installed."""
    return shutil.which("nvcc")


def nvcc_ptx(source: str, arch: str, *options: str) -> str:
    """Compile CUDA source text to PTX for `sm_80`, `sm_90a`, ..."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise FileNotFoundError("nvcc is not installed")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cu")
        path.write_text(source)
        command = [nvcc, "-ptx", f"-arch={arch}", *options, "-o", "kernel.ptx", path.name]
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(result.stderr)
        return Path(folder, "kernel.ptx").read_text()


def run_without_interpreter(script: Path, *args: str) -> str:
    """Run a Python script that compiles Triton kernels, and return what it prints.

    `TRITON_INTERPRET` replaces kernels by Python when Triton is imported, so that a test process
    that set it cannot compile any.
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(script), *args]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(result.stderr)
    return result.stdout
