"""Gets PTX out of nvcc."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path


def find_nvcc() -> str | None:
    """The path of nvcc, if it is installed."""
    return shutil.which("nvcc")


@cache
def nvcc_ptx(source: str, arch: str, *options: str) -> str:
    """Compile CUDA source text to PTX for `sm_80`, `sm_90a`, ...; a text is compiled once."""
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
