"""The CUDA kernels as machine code for GPUs that are not here: wide loads, no spills, registers."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = ("80", "90", "100")
# 65536 registers a multiprocessor. The rings take 64 KB a block: two of 256 threads fit an A100's
# 164 KB, three of them an H100's 228 KB.
MAX_REGISTERS, THREADS = 80, 256
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
    return compile_source("row_sums", tmp_path_factory.mktemp("cuda"))


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


@pytest.fixture(scope="module")
def fold_machine_code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_source("fold", tmp_path_factory.mktemp("cuda"))


def test_three_blocks_of_rows_fit_a_multiprocessor(machine_code: Path) -> None:
    for arch, kernels in by_architecture(machine_code, "-res-usage").items():
        assert len(kernels) == 20  # four element types: four rings, and rows that are not aligned
        for name, text in kernels.items():
            usage = {k: int(v) for k, v in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}
            assert usage["STACK"] == usage["LOCAL"] == 0, (arch, name, usage)
            assert usage["REG"] <= MAX_REGISTERS, (arch, name, usage)
            assert 3 * THREADS * usage["REG"] <= 65536


def test_rows_come_by_asynchronous_copies_and_nothing_spills(machine_code: Path) -> None:
    for arch, kernels in by_architecture(machine_code, "-sass").items():
        for name, text in kernels.items():
            assert not re.search(r"\b(LDL|STL)\b", text), (arch, name, "local memory")
            assert not re.search(r"\b(ATOMG?|RED)\.", text), (arch, name, "atomics")
            if "direct" in name:  # four loads of each row in flight
                assert len(re.findall(r"\bLDG\.E\.\S*128\S*CONSTANT", text)) == 8, (arch, name)
                continue
            copies = re.findall(r"\bLDGSTS\.E\.\S*128\S*", text)
            assert len(copies) >= 2, (arch, name)
            assert all("BYPASS" in copy for copy in copies), "nothing stays in L1"
            assert "ring" not in name or re.search(r"\bDEPBAR\.LE SB0, 0x[7f]\b", text)


def test_entries_are_summed_in_float32(machine_code: Path) -> None:
    """Between two widenings lie at most kShortSteps vectors of each input: 8 float64 operations."""
    widths = {"f": 4, "NS0_8BFloat16E": 8, "6__half": 8}
    for arch, kernels in by_architecture(machine_code, "-sass").items():
        for name, text in kernels.items():
            kind = next((kind for kind in widths if f"ringI{kind}L" in name), None)
            if kind is None:
                continue
            row, exact = split_at_exact_row(text)
            entries = 4 * widths[kind]  # of four vectors
            assert len(re.findall(r"\bFFMA\b", row)) == 3 * entries, (arch, name)
            per_vector = doubles_of(widening_loop(row)) / 4
            assert per_vector <= 12, (arch, name, per_vector)
            assert doubles_of(exact) > 4, (arch, name, "the row that is read again")


def doubles_of(text: str) -> int:
    return len(re.findall(r"\b(DADD|DFMA|DMUL|DSETP|F2F\.F64\.F32|F2F\.F32\.F64)\b", text))


def split_at_exact_row(text: str) -> tuple[str, str]:
    """Before and from the first load of a single entry, in the second pass over a row."""
    single = re.search(r"\bLDG\.E(\.U16)?(\.CONSTANT)? R", text)
    assert single is not None
    return text[: single.start()], text[single.start() :]


def widening_loop(row: str) -> str:
    """From the first copy waited for to the last conversion of the short sums."""
    start = re.search(r"\bDEPBAR\.LE", row)
    ends = list(re.finditer(r"\bF2F\.F64\.F32\b", row))
    assert start is not None
    assert ends
    return row[start.start() : ends[-1].end()]


def test_folds_do_not_spill(fold_machine_code: Path) -> None:
    for arch, kernels in by_architecture(fold_machine_code, "-res-usage").items():
        assert len(kernels) == 3
        for name, text in kernels.items():
            usage = {k: int(v) for k, v in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}
            assert usage["STACK"] == usage["LOCAL"] == 0, (arch, name, usage)
            assert usage["REG"] <= 128, (arch, name, usage)


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
