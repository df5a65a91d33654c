"""The NEON code without an AArch64 processor: the check program in an emulator, and the loops."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which("aarch64-linux-gnu-g++")
EMULATOR = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
FLAGS = ["-std=c++17", "-O3", "-fno-math-errno"]  # what setup.py and CMake pass

pytestmark = pytest.mark.skipif(
    COMPILER is None, reason="aarch64-linux-gnu-g++ (g++-aarch64-linux-gnu) is not installed"
)


@pytest.mark.skipif(EMULATOR is None, reason="qemu-aarch64 (qemu-user) is not installed")
def test_check_program_passes_in_an_emulator(tmp_path: Path) -> None:
    program = tmp_path / "check_row_sums"
    sources = [*ROOT.glob("csrc/cpu/*.cpp"), ROOT / "csrc" / "tests" / "check_row_sums.cpp"]
    command = [COMPILER, *FLAGS, "-static", "-pthread", "-o", program, *sources]
    subprocess.run(command, check=True)
    result = subprocess.run([EMULATOR, program], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    checks = dict(re.findall(r"^(\w+): (\d+) checks$", result.stdout, re.MULTILINE))
    assert set(checks) == {"baseline", "neon"}, result.stdout
    assert int(checks["neon"]) == int(checks["baseline"]) > 0


def innermost_loops(assembly: str) -> list[str]:
    """The instructions of each loop that holds no other label."""
    loops = []
    for part in re.split(r"^(?=\.L\w+:)", assembly, flags=re.MULTILINE):
        label = re.escape(part.partition(":")[0])
        jump_back = re.search(rf"^\t(b\S*|cbn?z)\t(\w+, )?{label}$", part, re.MULTILINE)
        if jump_back is not None:
            loops.append(part[: jump_back.end()])
    return loops


def test_sums_stay_in_registers(tmp_path: Path) -> None:
    target = tmp_path / "row_sums_neon.s"
    source = ROOT / "csrc" / "cpu" / "row_sums_neon.cpp"
    subprocess.run([COMPILER, *FLAGS, "-S", "-o", target, source], check=True)
    rows_together: dict[str, int] = {}
    for loop in innermost_loops(target.read_text()):
        operations = re.findall(r"^\t(\w+)\tv\d+\.4s", loop, re.MULTILINE)
        if "prfm" not in loop or "fmla" not in operations:
            continue  # the loops in float64, over tokens, and of the tail
        kind = (
            "float16" if "fcvtl" in operations else "bfloat16" if "shl" in operations else "float"
        )
        # Two registers a step and row: three fused sums each, and sum |d|.
        rows, rest = divmod(operations.count("fmla"), 6)
        assert rest == 0, loop
        assert operations.count("fadd") == 2 * rows, loop
        assert "fmul" not in operations, loop
        assert not re.findall(r"^\tst\w+\t.*|^\tld\w+\t[qdsv].*\[sp.*", loop, re.MULTILINE), loop
        rows_together[kind] = max(rows, rows_together.get(kind, 0))
    assert rows_together == {"float": 2, "bfloat16": 2, "float16": 2}
