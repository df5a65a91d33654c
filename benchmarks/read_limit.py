"""A pure read of a pair of tensors, in several ways: the fastest is the limit of every scorer.

On a GPU the kernels of read_limit.cu, compiled when they are first needed and kept in build/; where
nvcc is missing, reductions of torch over the same bytes, which are a little slower than the limit.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "benchmarks" / "read_limit.cu"
# Loads in flight, in pieces or side by side, blocks per multiprocessor, threads: those whose best
# gave the limit of an H200, 4.60 TB/s at 256 MB.
VARIANTS = (
    (4, False, 2, 1024),
    (8, False, 64, 256),
    (4, False, 4, 512),
    (4, True, 8, 256),
    (4, False, 1, 1024),
)

Read = Callable[[Tensor, Tensor], object]


def find_nvcc() -> str | None:
    """Under CUDA_HOME, on the path, or where CUDA is usually installed."""
    folders = [f"{os.environ['CUDA_HOME']}/bin"] if "CUDA_HOME" in os.environ else []
    folders += [os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"]
    return shutil.which("nvcc", path=os.pathsep.join(folders))


def compile_reads(architecture: str) -> Path:
    """The library of read_limit.cu for `90` or another architecture, compiled if it is not kept.

    Raises:
        FileNotFoundError: no nvcc.
        RuntimeError: nvcc refuses; the message is its own.
    """
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]
    target = ROOT / "build" / f"read_limit-{digest}-sm_{architecture}.so"
    if target.exists():
        return target
    nvcc = find_nvcc()
    if nvcc is None:
        raise FileNotFoundError("nvcc is not installed")
    target.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder, "made.so")
        code = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
        command = [nvcc, "-O3", "-std=c++17", code, "-shared", "-Xcompiler", "-fPIC", str(SOURCE)]
        result = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"nvcc cannot compile {SOURCE.name}: {result.stderr.strip()}")
        made.replace(target)
    return target


@functools.cache
def _library() -> tuple[ctypes.CDLL | None, str]:
    """The compiled reads, or why there are none."""
    try:
        major, minor = torch.cuda.get_device_capability()
        library = ctypes.CDLL(str(compile_reads(f"{major}{minor}")))
        _kernel(library, *VARIANTS[0])(*torch.zeros(2, 64, device="cuda"))  # the driver may refuse
        return library, ""
    except (OSError, RuntimeError) as error:
        return None, str(error)


def how_it_reads(device: str) -> str:
    """For people: what stands behind the limit."""
    if device == "cpu":
        return "a pure read of both tensors side by side"
    library, problem = _library()
    if library is not None:
        return f"the fastest of {len(VARIANTS)} kernels that only load, 16 bytes at a time"
    return f"the fastest of two reductions of torch, slower than a pure read ({problem})"


def reads(device: str) -> dict[str, Read]:
    """Ways to read all bytes of two tensors of which the second follows the first in memory."""
    if device == "cpu":
        return {"side by side": _read_on_cpu}
    library, _ = _library()
    if library is None:
        return {"torch.dot": _dot, "torch.amax": _largest}
    return {
        f"{loads} loads, {'pieces' if pieces else 'side by side'}, {blocks} x {threads}": _kernel(
            library, loads, pieces, blocks, threads
        )
        for loads, pieces, blocks, threads in VARIANTS
    }


def _kernel(library: ctypes.CDLL, loads: int, pieces: bool, blocks: int, threads: int) -> Read:
    sink = torch.zeros(1, dtype=torch.int32, device="cuda")
    most = blocks * torch.cuda.get_device_properties(0).multi_processor_count

    def run(x: Tensor, y: Tensor) -> None:
        size = y.data_ptr() + y.nbytes - x.data_ptr()
        assert size == x.nbytes + y.nbytes, "the tensors must lie one after the other"
        stream = torch.cuda.current_stream().cuda_stream
        code = library.read_memory(
            ctypes.c_void_p(x.data_ptr()),
            ctypes.c_int64(size),
            loads,
            int(pieces),
            max(1, min(most, size // 16 // threads)),
            threads,
            ctypes.c_void_p(sink.data_ptr()),
            ctypes.c_void_p(stream),
        )
        if code != 0:
            raise RuntimeError(f"read_memory: CUDA error {code}")

    return run


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return torch.dot(x.flatten().view(torch.float32), y.flatten().view(torch.float32))


def _largest(x: Tensor, y: Tensor) -> Tensor:
    both = x.flatten().view(torch.int32)
    return both.as_strided((2 * both.numel(),), (1,), both.storage_offset()).amax()


def _read_on_cpu(x: Tensor, y: Tensor) -> object:
    """Both side by side, which is faster on a CPU than one after the other."""
    from simdiff_kernels import _C

    return _C.read_memory(x.data_ptr(), y.data_ptr(), x.nbytes)
