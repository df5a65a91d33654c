"""What setup.py builds, beside which torch, and that a build that was insisted on fails aloud."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import runpy
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch.utils.cpp_extension  # noqa: F401  here, not in every child

from manylinux.build import check_symbols

ROOT = Path(__file__).resolve().parent.parent


NAMES = "[extension.name for extension in setup['extensions']()]"


@dataclass(frozen=True)
class Configured:
    """How setup.py ended and what it said."""

    returncode: int | None
    stdout: str
    stderr: str


def configure(
    folder: Path, wanted: str | None, nvcc: str | None, told: str = NAMES, compiler: str = "g++"
) -> Configured:
    """Run setup.py up to where the extensions are known, with this script as the only nvcc.

    In a forked process: a fresh one would import torch, which takes longer than all the rest.
    """
    if nvcc is not None:
        (folder / "nvcc").write_text(f"#!/bin/sh\n{nvcc}\n")
        (folder / "nvcc").chmod(0o755)
    dropped = {"SIMDIFF_CPU", "SIMDIFF_CUDA", "CUDA_HOME"}
    environment = {key: value for key, value in os.environ.items() if key not in dropped}
    environment |= {"PATH": f"{folder}:/usr/bin:/bin", "CXX": compiler}
    if wanted is not None:
        environment["SIMDIFF_CUDA"] = wanted
    said = folder / "stdout", folder / "stderr"

    def run() -> None:
        for number, path in enumerate(said, start=1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(ROOT)
        sys.argv = ["setup.py", "--quiet", "--name"]
        print(eval(told, {"setup": runpy.run_path("setup.py"), "json": json}))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    return Configured(process.exitcode, *(path.read_text() for path in said))


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
    assert ("the CUDA kernels are left out" in result.stderr) == (
        "_C_cuda" not in parts and wanted != "0"
    )


def test_without_a_compiler_both_parts_are_left_out_in_one_line_each(tmp_path: Path) -> None:
    result = configure(tmp_path, None, None, compiler="no-such-compiler")
    assert result.returncode == 0
    assert result.stdout.splitlines()[-1] == "[]"
    lines = [line for line in result.stderr.splitlines() if line.startswith("simdiff-kernels:")]
    assert len(lines) == 2
    assert "CPU kernels are left out: there is no C++ compiler" in lines[0]
    assert "another install bring the CPU kernels" in lines[0]
    assert "simdiff-kernels[triton]" in lines[1]


def test_a_part_that_was_insisted_on_needs_its_compiler(tmp_path: Path) -> None:
    result = configure(tmp_path, "1", LIBRARIES, compiler="no-such-compiler")
    assert result.returncode != 0
    assert "SIMDIFF_CUDA=1, but there is no C++ compiler" in result.stderr


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


# What torch's headers have after 2.10 even where 2.10 is targeted, compared for 2.10, 2.11 and 2.13
# in torch/csrc/stable and torch/headeronly. The headers alone are cheap to get, from the 80 MB of
# `pip download torch==2.10.0 --no-deps --platform macosx_11_0_arm64`.
AFTER_2_10 = r"\bSTABLE_TORCH_ERROR_CODE_CHECK\b|\.layout\(\)"
TORCH_SOURCES = sorted(path.name for path in (ROOT / "csrc" / "torch").glob("*.cpp"))


@pytest.fixture(scope="module")
def compilations(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Of every file of csrc/torch, the arguments that setup.py gives the compiler."""
    told = "json.dumps([[e.sources, e.extra_compile_args, e.include_dirs] "
    told += "for e in setup['extensions']()])"
    result = configure(tmp_path_factory.mktemp("setup"), "1", LIBRARIES, told)
    assert result.returncode == 0, result.stderr
    return {
        Path(source).name: [*flags, *(f"-I{folder}" for folder in folders)]
        for sources, flags, folders in json.loads(result.stdout.splitlines()[-1])
        for source in sources
    }


def test_every_file_that_sees_torch_is_compiled(compilations: dict[str, list[str]]) -> None:
    assert set(TORCH_SOURCES) <= set(compilations)


@pytest.mark.parametrize("source", TORCH_SOURCES)
def test_is_compiled_for_every_python(source: str, compilations: dict[str, list[str]]) -> None:
    """Only the limited API of 3.10 is seen, and the file compiles with it."""
    python = [f"-I{sysconfig.get_path('include')}", "-DPy_LIMITED_API=0x030A0000"]
    command = ["g++", "-std=c++20", "-fsyntax-only", "-w", *python, *compilations[source]]
    path = ROOT / "csrc" / "torch" / source
    result = subprocess.run([*command, str(path)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_wheel_is_one_for_every_python(tmp_path: Path) -> None:
    told = "json.dumps([setup['PYTHON_TAG'], setup['cpp_extension'].min_supported_cpython, "
    told += "[e.py_limited_api for e in setup['extensions']()]])"
    result = configure(tmp_path, "1", LIBRARIES, told)
    expected = ["cp310", "0x030A0000", [True, True]]
    assert json.loads(result.stdout.splitlines()[-1]) == expected, result.stderr


@pytest.mark.parametrize("name", ["_C", "_C_cuda"])
def test_a_module_shows_nothing_but_its_entry(name: str) -> None:
    """So that its CUDA runtime is not mistaken for torch's."""
    pytest.importorskip(f"simdiff_kernels.{name}", reason=f"{name} is not built")
    path = ROOT / "simdiff_kernels" / f"{name}.abi3.so"
    command = ["nm", "-D", "--defined-only", "--format=just-symbols", str(path)]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert shown == [f"PyInit_{name}"]


def test_the_wheel_refuses_symbols_of_a_library_that_old_machines_lack(tmp_path: Path) -> None:
    (tmp_path / "a.cpp").write_text("#include <vector>\nvoid f() { std::__throw_bad_alloc(); }\n")
    module = tmp_path / "a.so"
    build = ["g++", "-shared", "-fPIC", "-o", str(module), str(tmp_path / "a.cpp")]
    subprocess.run(build, check=True)
    check_symbols("a.so", module)
    subprocess.run([*build, "-nostdlib"], check=True)  # nobody says whose symbol it is
    with pytest.raises(SystemExit, match=r"a.so: _ZSt17__throw_bad_allocv must come from"):
        check_symbols("a.so", module)


def test_nothing_is_used_that_torch_2_10_lacks() -> None:
    for path in (ROOT / "csrc" / "torch").iterdir():
        assert re.findall(AFTER_2_10, path.read_text()) == [], path


def test_the_abi_is_set_before_any_header_of_torch() -> None:
    """Defined after one of them, it would be without effect."""
    including = [
        path
        for path in (ROOT / "csrc" / "torch").iterdir()
        if "#include <torch/" in path.read_text()
    ]
    assert [path.name for path in including] == ["stable_abi.h"]
    text = including[0].read_text()
    assert "#define TORCH_TARGET_VERSION 0x020a000000000000\n" in text
    assert text.index("#define TORCH_TARGET_VERSION") < text.index("#include <torch/")
