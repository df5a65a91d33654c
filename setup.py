"""Builds the compiled scorers; everything else about the distribution is in pyproject.toml.

What cannot be built is left out and told at the end: the package then scores by Triton on a GPU
and by plain PyTorch elsewhere. `SIMDIFF_CPU=1` and `SIMDIFF_CUDA=1` fail instead, `SIMDIFF_CPU=0`
and `SIMDIFF_CUDA=0` leave a part out. `SIMDIFF_CUDA_ARCHITECTURES="80;90"` overrides what for.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from setuptools import setup
from torch.utils import cpp_extension
from torch.utils.cpp_extension import BuildExtension, CppExtension

# A GPU runs the code of its own architecture or of an older one with the same first digit; the
# last one is also kept as PTX, which newer GPUs compile on first use.
CUDA_ARCHITECTURES = {
    "75": "T4 and RTX 20; no other backend than plain PyTorch serves them, Triton begins at 80",
    "80": "A100, A30",
    "86": "A10, A40, RTX 30; L4, L40 and RTX 40 (89) run it too",
    "90": "H100, H200, GH200",
    "100": "B200, GB200",
    "103": "B300, GB300",
    "120": "RTX 50, RTX PRO 6000; the last one, which newer GPUs compile",
}
# The oldest Python that the compiled modules serve, as CPython writes it: 3.10.
cpp_extension.min_supported_cpython, PYTHON_TAG = "0x030A0000", "cp310"

WITHOUT = {
    "SIMDIFF_CPU": "CPU tensors are scored by plain PyTorch, which is slower; "
    "a C++17 compiler (g++ or clang++) on PATH and another install bring the CPU kernels",
    "SIMDIFF_CUDA": "GPUs are scored by Triton (pip install 'simdiff-kernels[triton]'); "
    "nvcc on PATH or in CUDA_HOME and another install bring the CUDA kernels",
}
left_out: dict[str, str] = {}


def sources(*patterns: str) -> list[str]:
    """The files of csrc/ that match, in a fixed order."""
    return sorted(str(path) for pattern in patterns for path in Path("csrc").glob(pattern))


def compile_flags(name: str) -> list[str]:
    """Flags of the host compiler for the extension called `name`."""
    # sqrt need not set errno, so that a loop of them becomes vector code; NaN and Inf stay exact.
    flags = ["-O3", "-g0", "-Wall", "-fvisibility=hidden", "-fno-math-errno"]
    # Messages of torch's headers name their file: not that of the machine that built them.
    flags += [f"-ffile-prefix-map={path}=." for path in (Path.cwd(), Path(torch.__file__).parent)]
    return [*flags, f"-DSIMDIFF_EXTENSION_NAME={name}"]


def wanted(part: str) -> bool:
    """Whether SIMDIFF_CPU or SIMDIFF_CUDA asks for its part or leaves the choice open."""
    value = os.environ.get(part, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"{part} must be 0 or 1, got {value!r}")
    return value != "0"


def leave_out(part: str, reason: object) -> None:
    """Go on without a part, to be told at the end, unless SIMDIFF_CUDA=1 or the like insists."""
    if os.environ.get(part) == "1":
        raise reason if isinstance(reason, Exception) else SystemExit(f"{part}=1, but {reason}")
    left_out[part] = str(reason)


def find_nvcc() -> str | None:
    """nvcc under CUDA_HOME or on the path."""
    home = os.environ.get("CUDA_HOME")
    return (shutil.which("nvcc", path=f"{home}/bin") if home else None) or shutil.which("nvcc")


def architecture_flags(nvcc: str) -> list[str]:
    """-gencode for each architecture asked for (by default those that this nvcc knows)."""
    text = subprocess.run([nvcc, "--list-gpu-arch"], check=True, capture_output=True, text=True)
    known = set(re.findall(r"compute_(\w+)", text.stdout))
    asked = os.environ.get("SIMDIFF_CUDA_ARCHITECTURES")
    chosen = asked.split(";") if asked else [arch for arch in CUDA_ARCHITECTURES if arch in known]
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
        """Build one extension, or leave it out where it is not insisted on."""
        part = "SIMDIFF_CUDA" if ext.name.endswith("_C_cuda") else "SIMDIFF_CPU"
        try:
            if part == "SIMDIFF_CUDA":
                ext.extra_objects = self.compile_cuda()
            super().build_extension(ext)
        except Exception as error:
            leave_out(part, error)
            ext.optional = True  # what setuptools asks before it wants the file

    def compile_cuda(self) -> list[str]:
        """Compile csrc/cuda/*.cu, where anything has changed since, and return the objects."""
        nvcc, objects = find_nvcc(), []
        headers = [Path(path) for path in sources("cuda/*.*h", "common/*.h")]
        for source in sources("cuda/*.cu"):
            target = Path(self.build_temp, source).with_suffix(".o")
            target.parent.mkdir(parents=True, exist_ok=True)
            host = ["-Xcompiler", "-fPIC,-fvisibility=hidden"]
            command = [nvcc, "-c", source, "-o", str(target), "-std=c++17", "-O3", *host]
            command += ["--threads", "0", *architecture_flags(nvcc)]
            objects.append(str(target))
            done = target.with_suffix(".command")  # written last: what it tells of is whole
            newest = max(path.stat().st_mtime for path in [Path(source), *headers])
            known = done.exists() and done.read_text() == " ".join(command)
            if known and target.exists() and done.stat().st_mtime > newest:
                continue
            print(" ".join(command), flush=True)
            done.unlink(missing_ok=True)
            subprocess.run(command, check=True)
            done.write_text(" ".join(command))
        return objects


def extension(name: str, files: list[str], **options: list[str]) -> CppExtension:
    """One module in CPython's limited API, without symbols for debuggers and paths of the build."""
    exports = "-Wl,--version-script=csrc/torch/exports.map"
    link = ["-Wl,--strip-all", exports, *options.pop("extra_link_args", [])]
    return CppExtension(
        f"simdiff_kernels.{name}",
        files,
        py_limited_api=True,
        extra_compile_args=compile_flags(name),
        extra_link_args=link,
        **options,
    )


def cuda_extension(nvcc: str) -> CppExtension:
    """The CUDA module.

    The CUDA runtime is linked in and its symbols kept private: torch brings its own, of another
    version perhaps. libtorch stays a dependency, through which a CUDA build's stream is found.
    """
    return extension(
        "_C_cuda",
        sources("torch/cuda_*.cpp"),
        library_dirs=library_folders(nvcc),
        libraries=["cudart_static", "dl", "rt", "pthread"],
        extra_link_args=["-Wl,--no-as-needed", "-ltorch"],
    )


def find_compiler() -> str | None:
    """The C++ compiler that torch's helper will call."""
    return shutil.which(os.environ.get("CXX", "c++").split()[0])


def extensions() -> list[CppExtension]:
    """The CPU module and the CUDA module, each where it is wanted and can be built."""
    found: list[CppExtension] = []
    cpu, cuda, nvcc = wanted("SIMDIFF_CPU"), wanted("SIMDIFF_CUDA"), find_nvcc()
    if find_compiler() is None:
        for part, asked in (("SIMDIFF_CPU", cpu), ("SIMDIFF_CUDA", cuda)):
            if asked:
                leave_out(part, "there is no C++ compiler")
        return found
    if cpu:
        found.append(
            extension("_C", sources("cpu/*.cpp", "torch/operators.cpp", "torch/module.cpp"))
        )
    if cuda and nvcc is None:
        leave_out("SIMDIFF_CUDA", "nvcc is neither on PATH nor in CUDA_HOME/bin")
    elif cuda:
        try:
            found.append(cuda_extension(nvcc))
        except Exception as error:
            leave_out("SIMDIFF_CUDA", error)
    return found


def tell_what_is_missing() -> None:
    """One line for each part that was left out, why, and how to get it; once in an install."""
    if {"egg_info", "dist_info", "sdist"} & set(sys.argv):  # pip asks these before it builds
        return
    for part, reason in left_out.items():
        kernels = {"SIMDIFF_CPU": "CPU", "SIMDIFF_CUDA": "CUDA"}[part]
        line = f"simdiff-kernels: the {kernels} kernels are left out: {reason}. {WITHOUT[part]}."
        print(line, file=sys.stderr)


modules = extensions()
setup(
    ext_modules=modules,
    cmdclass={"build_ext": BuildScorers},
    options={"bdist_wheel": {"py_limited_api": PYTHON_TAG}} if modules else {},
)
tell_what_is_missing()
