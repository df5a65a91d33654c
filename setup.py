"""Builds the compiled scorers; everything else about the distribution is in pyproject.toml.

`SIMDIFF_CUDA=0` leaves the CUDA part out, `SIMDIFF_CUDA=1` fails where it cannot be built; without
either it is built where nvcc is found. `SIMDIFF_CUDA_ARCHITECTURES="80;90"` overrides what for.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

# What an A100, an H100 and a B200 run; newer GPUs compile the PTX of the last one.
CUDA_ARCHITECTURES = "80;90;100"


def sources(*patterns: str) -> list[str]:
    """The files of csrc/ that match, in a fixed order."""
    return sorted(str(path) for pattern in patterns for path in Path("csrc").glob(pattern))


def compile_flags(name: str) -> list[str]:
    """Flags of the host compiler for the extension called `name`."""
    # sqrt need not set errno, so that a loop of them becomes vector code; NaN and Inf stay exact.
    flags = ["-O3", "-Wall", "-fvisibility=hidden", "-fno-math-errno"]
    return [*flags, f"-DSIMDIFF_EXTENSION_NAME={name}"]


def find_nvcc() -> str | None:
    """nvcc on the path or under CUDA_HOME, unless SIMDIFF_CUDA=0."""
    wanted = os.environ.get("SIMDIFF_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"SIMDIFF_CUDA must be 0 or 1, got {wanted!r}")
    if wanted == "0":
        return None
    home = os.environ.get("CUDA_HOME")
    nvcc = (shutil.which("nvcc", path=f"{home}/bin") if home else None) or shutil.which("nvcc")
    if nvcc is None and wanted == "1":
        raise SystemExit("SIMDIFF_CUDA=1, but nvcc is neither on PATH nor in CUDA_HOME/bin")
    return nvcc


def architecture_flags(nvcc: str) -> list[str]:
    """-gencode for each architecture asked for (by default those that this nvcc knows)."""
    text = subprocess.run([nvcc, "--list-gpu-arch"], check=True, capture_output=True, text=True)
    known = set(re.findall(r"compute_(\w+)", text.stdout))
    asked = os.environ.get("SIMDIFF_CUDA_ARCHITECTURES")
    chosen = [arch for arch in (asked or CUDA_ARCHITECTURES).split(";") if arch in known or asked]
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in chosen]
    return [*flags, f"-gencode=arch=compute_{chosen[-1]},code=compute_{chosen[-1]}"]


def library_folders(nvcc: str) -> list[str]:
    """Where the CUDA runtime lies that belongs to this nvcc."""
    command = [nvcc, "--dryrun", "csrc/cuda/fold.cu"]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    line = next(line for line in text.splitlines() if line.startswith("#$ LIBRARIES="))
    return [os.path.normpath(folder) for folder in re.findall(r'"-L([^"]+)"', line)]


class BuildScorers(BuildExtension):
    """Compiles CUDA sources with nvcc itself: torch's helper needs a torch built with CUDA."""

    def build_extension(self, ext):
        """Build one extension; without SIMDIFF_CUDA=1 a failing CUDA part is left out, aloud."""
        if not ext.name.endswith("_C_cuda"):
            return super().build_extension(ext)
        try:
            ext.extra_objects = self.compile_cuda()
            super().build_extension(ext)
        except Exception as error:
            leave_out(error)
            ext.optional = True  # what setuptools asks before it wants the file

    def compile_cuda(self) -> list[str]:
        """Compile csrc/cuda/*.cu and return the objects."""
        nvcc, objects = find_nvcc(), []
        for source in sources("cuda/*.cu"):
            target = Path(self.build_temp, source).with_suffix(".o")
            target.parent.mkdir(parents=True, exist_ok=True)
            host = ["-Xcompiler", "-fPIC,-fvisibility=hidden"]
            command = [nvcc, "-c", source, "-o", str(target), "-std=c++17", "-O3", *host]
            command += ["--threads", "0", *architecture_flags(nvcc)]
            print(" ".join(command), flush=True)
            subprocess.run(command, check=True)
            objects.append(str(target))
        return objects


def cuda_extension(nvcc: str) -> CppExtension:
    """The CUDA module.

    The CUDA runtime is linked in and its symbols kept private: torch brings its own, of another
    version perhaps. libtorch stays a dependency, through which a CUDA build's stream is found.
    """
    return CppExtension(
        "simdiff_kernels._C_cuda",
        sources("torch/cuda_*.cpp"),
        extra_compile_args=compile_flags("_C_cuda"),
        library_dirs=library_folders(nvcc),
        libraries=["cudart_static", "dl", "rt", "pthread"],
        extra_link_args=["-Wl,--exclude-libs,ALL", "-Wl,--no-as-needed", "-ltorch"],
    )


def extensions() -> list[CppExtension]:
    """The CPU module, and the CUDA module where it can be built."""
    cpu = CppExtension(
        "simdiff_kernels._C",
        sources("cpu/*.cpp", "torch/operators.cpp", "torch/module.cpp"),
        extra_compile_args=compile_flags("_C"),
    )
    nvcc = find_nvcc()
    if nvcc is None:
        return [cpu]
    try:
        return [cpu, cuda_extension(nvcc)]
    except Exception as error:
        leave_out(error)
        return [cpu]


def leave_out(error: Exception) -> None:
    """Go on without the CUDA part, aloud, unless SIMDIFF_CUDA=1 insists on it."""
    if os.environ.get("SIMDIFF_CUDA") == "1":
        raise error
    print(f"simdiff-kernels: the CUDA part is left out: {error}", file=sys.stderr)


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildScorers})
