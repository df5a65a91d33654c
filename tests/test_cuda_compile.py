"""The CUDA kernels as machine code for GPUs that are not here: wide loads, no spills, registers."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = ("80", "90", "100")
NUM_KERNELS = 8  # four element types, a row for a warp or for a block
# 65536 registers and 2048 threads a multiprocessor: 64 registers leave half of the threads.
MAX_REGISTERS, THREADS, BLOCKS = 64, 256, 4
SHARED_MEMORY = 164 * 1024  # of a multiprocessor of an A100, the smallest of them

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")


def disassembler() -> str:
    """cuobjdump of the CUDA toolkit, or the one that Triton carries."""
    triton = pytest.importorskip("triton", reason="cuobjdump is taken from Triton")
    carried = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return shutil.which("cuobjdump") or str(carried)


@pytest.fixture(scope="module")
def machine_code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("cuda") / "layer_metrics.o"
    source = ROOT / "csrc" / "cuda" / "layer_metrics.cu"
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES]
    command = ["nvcc", "-c", str(source), "-o", str(target), "-std=c++17", "-O3", "--threads", "2"]
    subprocess.run([*command, *flags], check=True)
    return target


def by_architecture(machine_code: Path, option: str) -> dict[str, dict[str, str]]:
    """Architecture to kernel to what cuobjdump tells about it."""
    command = [disassembler(), option, str(machine_code)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: dict[str, dict[str, str]] = {}
    for part in re.split(r"\n(?=Fatbin elf code)", text):
        arch = re.search(r"arch = sm_(\w+)", part)
        pieces = re.split(r"Function\s*:?\s+(\w+)", part)
        if arch is not None and len(pieces) > 1:
            found[arch[1]] = dict(zip(pieces[1::2], pieces[2::2], strict=True))
    assert set(found) == set(ARCHITECTURES)
    return found


def test_registers_and_memory_leave_half_of_the_threads(machine_code: Path) -> None:
    for arch, kernels in by_architecture(machine_code, "-res-usage").items():
        assert len(kernels) == NUM_KERNELS
        for name, text in kernels.items():
            usage = {k: int(v) for k, v in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}
            assert usage["STACK"] == usage["LOCAL"] == 0, (arch, name, usage)
            assert usage["REG"] <= MAX_REGISTERS, (arch, name, usage)
            assert BLOCKS * THREADS * usage["REG"] <= 65536
            assert BLOCKS * (usage["SHARED"] + 1024) <= SHARED_MEMORY, (arch, name, usage)


def test_loads_are_wide_and_nothing_spills(machine_code: Path) -> None:
    for arch, kernels in by_architecture(machine_code, "-sass").items():
        for name, text in kernels.items():
            # Before and after: four loads in flight where a warp has a row, else two.
            wanted = 2 * (4 if "Li1E" in name else 2)
            wide = re.findall(r"\bLDG\.E\.\S*128\S*CONSTANT\S*", text)
            assert len(wide) == wanted, (arch, name, wide)
            assert not re.search(r"\b(LDL|STL)\b", text), (arch, name, "local memory")
            # No sum is formed by atomics: only the counter of finished blocks is.
            assert len(re.findall(r"\b(?:ATOMG|ATOM|RED)\.", text)) == 1, (arch, name)


def test_wide_loads_are_issued_before_the_first_conversion(machine_code: Path) -> None:
    """Otherwise a warp waits for memory several times in each round."""
    for arch, kernels in by_architecture(machine_code, "-sass").items():
        for name, text in kernels.items():
            loads = list(re.finditer(r"LDG\.E\.\S*128\.CONSTANT", text))
            arithmetic = re.compile(r"\b(DFMA|DADD|F2F\.F64)").search(text, loads[0].start())
            assert arithmetic is not None
            early = sum(load.start() < arithmetic.start() for load in loads)
            # CUDA 13.0 moves the last of eight loads of 2-byte entries back on sm_100.
            assert early >= len(loads) - (arch == "100"), (arch, name, early)


def test_partial_states_are_fenced_before_and_after_the_counter(machine_code: Path) -> None:
    """What an interpreter in lock step cannot see: other blocks must see the states first."""
    for arch, kernels in by_architecture(machine_code, "-sass").items():
        for name, text in kernels.items():
            steps = re.findall(r"\b(MEMBAR(?=\.\S*GPU)|BAR(?=\.SYNC)|ATOM)", text)
            counter = steps.index("ATOM")
            wanted = ["MEMBAR", "BAR", "ATOM", "MEMBAR", "BAR"]
            assert steps[counter - 2 : counter + 3] == wanted, (arch, name, steps)
