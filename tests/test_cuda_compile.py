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
# Of all blocks in one pass: a quarter of the threads, two blocks with 79 KB for their slices.
BLOCK_REGISTERS, BLOCK_BLOCKS, SLICE_BYTES = 128, 2, 79 * 1024
SHARED_MEMORY = 164 * 1024  # of a multiprocessor of an A100, the smallest of them

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")


def disassembler() -> str:
    """cuobjdump of the CUDA toolkit, or the one that Triton carries."""
    triton = pytest.importorskip("triton", reason="cuobjdump is taken from Triton")
    carried = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return shutil.which("cuobjdump") or str(carried)


def compile_source(name: str, folder: Path) -> Path:
    target, source = folder / f"{name}.o", ROOT / "csrc" / "cuda" / f"{name}.cu"
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES]
    command = ["nvcc", "-c", str(source), "-o", str(target), "-std=c++17", "-O3", "--threads", "2"]
    subprocess.run([*command, *flags], check=True)
    return target


@pytest.fixture(scope="module")
def machine_code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_source("layer_metrics", tmp_path_factory.mktemp("cuda"))


@pytest.fixture(scope="module")
def block_machine_code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_source("block_metrics", tmp_path_factory.mktemp("cuda"))


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


def test_blocks_leave_room_for_two(block_machine_code: Path) -> None:
    for arch, kernels in by_architecture(block_machine_code, "-res-usage").items():
        assert len(kernels) == 5  # four element types, and the joining kernel
        for name, text in kernels.items():
            usage = {k: int(v) for k, v in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}
            assert usage["STACK"] == usage["LOCAL"] == 0, (arch, name, usage)
            assert usage["REG"] <= BLOCK_REGISTERS, (arch, name, usage)
            assert BLOCK_BLOCKS * THREADS * usage["REG"] <= 65536
            slices = SLICE_BYTES if "block_metrics_kernel" in name else 0
            reserved = 1024 if arch == "80" else 0  # told as shared memory from sm_90 on
            needed = BLOCK_BLOCKS * (usage["SHARED"] + slices + reserved)
            assert needed <= SHARED_MEMORY, (arch, name)


def test_blocks_load_wide_and_sum_in_registers(block_machine_code: Path) -> None:
    """The loop over 4 x 4 pairs does little but the 48 operations of each entry."""
    for arch, kernels in by_architecture(block_machine_code, "-sass").items():
        for name, text in kernels.items():
            assert not re.search(r"\b(LDL|STL)\b", text), (arch, name, "local memory")
            assert not re.search(r"\b(ATOMG?|RED)\.", text), (arch, name, "atomics")
            if "join" in name:
                continue
            # A slice: four loads of 16 bytes in flight, stored as they are.
            assert len(re.findall(r"\bLDG\.E\.\S*128\S*CONSTANT", text)) == 4, (arch, name)
            assert len(re.findall(r"\bSTS\.128\b", text)) == 4, (arch, name)
            if "IdE" in name:
                continue
            useful, issued = max(loops_of(text), key=lambda loop: loop[0])
            entries = 2 if "IfE" in name else 4
            assert useful == 48 * entries, (arch, name, useful)
            assert issued <= 1.32 * useful, (arch, name, issued)


def loops_of(sass: str) -> list[tuple[int, int]]:
    """Of each innermost loop the float32 instructions and all instructions."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]+);", sass)
    code = [(int(place, 16), text) for place, text in found]
    jumps = [
        (int(jump[1], 16), place)
        for place, text in code
        if (jump := re.search(r"\bBRA (?:`\()?0x([0-9a-f]+)", text)) and int(jump[1], 16) < place
    ]
    inner = [
        (start, end)
        for start, end in jumps
        if not any(start <= s and e <= end for s, e in jumps if (s, e) != (start, end))
    ]
    counts = []
    for start, end in inner:
        body = [text for place, text in code if start <= place <= end]
        useful = sum(bool(re.search(r"\b(FADD|FFMA|FADD2|FFMA2)\b", text)) for text in body)
        counts.append((useful, len(body)))
    return counts
