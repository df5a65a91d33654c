"""The direction of imports: simdiff -> simdiff_kernels -> csrc, never the other way."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add((node.module or "").split(".")[0])
    return names


def test_kernels_need_only_torch_and_triton() -> None:
    import sys

    allowed = {"torch", "triton", "simdiff_kernels", "numpy"} | sys.stdlib_module_names
    files = list((ROOT / "simdiff_kernels").rglob("*.py"))
    assert len(files) > 5
    for path in files:
        extra = imported(path) - allowed
        assert not extra, f"{path.name} imports {extra}"
        if "numpy" in imported(path):
            assert path.name == "testing.py"
        if "triton" in imported(path):
            assert path.parent.name == "triton"


def test_toolkit_uses_only_the_public_scorers() -> None:
    for path in (ROOT / "python" / "simdiff").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
                "simdiff_kernels"
            ):
                assert node.module == "simdiff_kernels", f"{path}: {node.module}"


def test_only_csrc_torch_sees_torch() -> None:
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"}]
    assert len(sources) > 8
    for path in sources:
        headers = re.findall(r'#include [<"](torch|ATen|c10|pybind11)/', path.read_text())
        assert not headers or path.parent.name == "torch", f"{path}: {headers}"
