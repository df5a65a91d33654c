"""The CUDA kernels as machine code for GPUs that are not here: wide loads, no spills, registers."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = ("80", "90", "100")
# 65536 registers a multiprocessor; what the rings of a CTA leave of its shared memory is system's.
MAX_REGISTERS, MAX_THREADS = 128, 512
THREADS = 256  # of a CTA of all blocks
# Of all blocks in one pass: a quarter of the threads, two CTAs with 73 KB for their slices.
BLOCK_REGISTERS, BLOCK_CTAS, SLICE_BYTES = 128, 2, 73 * 1024
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
    return compile_source("block_sums", tmp_path_factory.mktemp("cuda"))


@pytest.fixture(scope="module")
def block_fold_machine_code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_source("block_fold", tmp_path_factory.mktemp("cuda"))


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


def test_16_warps_of_rows_fit_a_multiprocessor(machine_code: Path) -> None:
    for arch, kernels in by_architecture(machine_code, "-res-usage").items():
        assert len(kernels) == 16  # four element types: three rings, and rows that are not aligned
        for name, text in kernels.items():
            usage = {k: int(v) for k, v in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}
            assert usage["STACK"] == usage["LOCAL"] == 0, (arch, name, usage)
            assert usage["REG"] <= MAX_REGISTERS, (arch, name, usage)
            assert MAX_THREADS * usage["REG"] <= 65536
            # As much dynamic memory as a CTA may have is allowed; 64 KB where a CTA shares a row.
            # Some architectures count the kilobyte that the system takes.
            static = 512 if "Li256E" in name else 0
            assert usage["SHARED"] in (static, static + 1024), (arch, name, usage)


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
            assert "ring" not in name or re.search(r"\bDEPBAR\.LE SB0, 0x[37]\b", text)


def test_entries_are_summed_in_float32(machine_code: Path) -> None:
    """Between two widenings lie at most kShortSteps vectors of each input: 8 float64 operations."""
    widths = {"f": 4, "NS_8BFloat16E": 8, "NS_7Float16E": 8}
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


def resources(text: str) -> dict[str, int]:
    return {k: int(v) for k, v in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}


def test_blocks_leave_room_for_two(block_machine_code: Path) -> None:
    for arch, kernels in by_architecture(block_machine_code, "-res-usage").items():
        assert len(kernels) == 8  # four element types, with and without the absolute difference
        for name, text in kernels.items():
            usage = resources(text)
            assert usage["STACK"] == usage["LOCAL"] == 0, (arch, name, usage)
            assert usage["REG"] <= BLOCK_REGISTERS, (arch, name, usage)
            assert BLOCK_CTAS * THREADS * usage["REG"] <= 65536
            reserved = 1024 if arch == "80" else 0  # told as shared memory from sm_90 on
            needed = BLOCK_CTAS * (usage["SHARED"] + SLICE_BYTES + reserved)
            assert needed <= SHARED_MEMORY, (arch, name)


def test_the_fold_of_blocks_keeps_its_sums_in_registers(block_fold_machine_code: Path) -> None:
    for arch, kernels in by_architecture(block_fold_machine_code, "-res-usage").items():
        (text,) = kernels.values()
        usage = resources(text)
        assert usage["STACK"] == usage["LOCAL"] == 0, (arch, usage)
        assert THREADS * usage["REG"] <= 65536, (arch, usage)
    for arch, kernels in by_architecture(block_fold_machine_code, "-sass").items():
        (text,) = kernels.values()
        assert not re.search(r"\b(LDL|STL|ATOMG?|RED)\b", text), arch


# Per 16 bytes of each row: the float32 operations of 16 pairs, and of a triangle.
USEFUL = {"square": 32, "triangle": 35}


def test_blocks_copy_asynchronously_and_sum_in_registers(block_machine_code: Path) -> None:
    """The loops over tiles do little but the float32 operations that the sums need."""
    for arch, kernels in by_architecture(block_machine_code, "-sass").items():
        for name, text in kernels.items():
            assert not re.search(r"\b(LDL|STL)\b", text), (arch, name, "local memory")
            assert not re.search(r"\b(ATOMG?|(?<!BAR\.)RED)\.", text), (arch, name)
            # Two vectors of a row for each lane, before the first token and in the loop.
            copies = re.findall(r"\bLDGSTS\.E\.BYPASS\.128", text)
            assert len(copies) == 4, (arch, name)
            if "Id" in name.rsplit("kernel", 1)[1][:3]:
                continue
            entries = 4 if "kernelIf" in name else 8
            loops = [loop for loop in loops_of(text) if loop.useful > 100]
            if "Lb1E" in name:  # the absolute difference: 16 and 7 pairs, each an addition more
                loops = [loop for loop in loops if loop.products]
            assert len(loops) == 2, (arch, name, loops)
            for kind, loop in zip(USEFUL, sorted(loops, key=lambda loop: -loop.loads), strict=True):
                assert loop.useful == USEFUL[kind] * entries, (arch, name, kind, loop)
                assert loop.loads == (8 if kind == "square" else 6), (arch, name, kind, loop)
                conversions = 0 if entries == 4 else loop.loads * entries
                overhead = loop.issued - loop.useful - loop.loads - conversions
                assert overhead <= 16, (arch, name, kind, loop)
                assert loop.float64 == 0, (arch, name, kind, loop)


def test_instructions_of_a_token(block_machine_code: Path) -> None:
    """33 states of 4096 bf16 entries: what the head of csrc/cuda/block_sums.cu says."""
    text = next(
        text
        for name, text in by_architecture(block_machine_code, "-sass")["90"].items()
        if "BFloat16ELb0E" in name
    )
    square, triangle = (
        loop.issued
        for loop in sorted(
            (loop for loop in loops_of(text) if loop.useful > 100), key=lambda loop: -loop.loads
        )
    )
    # 7 quads of squares and 2 of triangles; 64 steps of 8 entries in 4096, by 8 lanes.
    loops = 64 * (7 * square + 2 * triangle)
    assert loops == pytest.approx(196_000, rel=0.01)
    assert loops / (132 * 4) * 16384 / 1.98e9 == pytest.approx(3.07e-3, rel=0.01)  # seconds


class Loop(NamedTuple):
    """Counts of instructions: float32 operations, all, loads from shared memory, float64."""

    useful: int
    issued: int
    loads: int
    float64: int
    products: int


def loops_of(sass: str) -> list[Loop]:
    """All innermost loops."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]+);", sass)
    code = [(int(place, 16), text) for place, text in found]
    jumps = [
        (int(jump[1], 16), place)
        for place, text in code
        if (jump := re.search(r"\bBRA (?:\w+, )?(?:`\()?0x([0-9a-f]+)", text))
        and int(jump[1], 16) < place
    ]
    inner = [
        (start, end)
        for start, end in jumps
        if not any(start <= s and e <= end for s, e in jumps if (s, e) != (start, end))
    ]
    patterns = (
        r"\b(FADD|FFMA|FADD2|FFMA2)\b",
        "",
        r"\bLDS\b",
        r"\b(DADD|DFMA|DMUL|F2F)\b",
        r"\b(FFMA|FFMA2)\b",
    )
    bodies = [[text for place, text in code if start <= place <= end] for start, end in inner]
    return [
        Loop(*(sum(bool(re.search(p, text)) for text in body) for p in patterns)) for body in bodies
    ]
