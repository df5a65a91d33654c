"""Builds the compiled scorers; everything else about the distribution is in pyproject.toml."""

from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

SOURCES = sorted(str(path) for path in Path("csrc").glob("*/*.cpp") if path.parts[1] != "tests")

# One build serves every torch from 2.10 on: only its stable ABI is used.
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"

setup(
    ext_modules=[
        CppExtension(
            "simdiff_kernels._C",
            SOURCES,
            extra_compile_args=[
                "-O3",
                "-Wall",
                "-fvisibility=hidden",
                "-DSIMDIFF_EXTENSION_NAME=_C",
                STABLE_ABI,
            ],
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
