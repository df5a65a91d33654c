"""The direction of imports: simdiff -> simdiff_kernels -> csrc, never the other way."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add((node.module or "").split(".")[0])
    return names


def test_kernels_need_only_torch_and_triton() -> None:
    # Not by its own name: a kernel from the hub has another (tools/hub_kernel.py).
    allowed = {"torch", "triton", "numpy"} | sys.stdlib_module_names
    files = list((ROOT / "simdiff_kernels").rglob("*.py"))
    assert len(files) > 5
    for path in files:
        extra = imported(path) - allowed
        assert not extra, f"{path.name} imports {extra}"
        if "numpy" in imported(path):
            assert path.parent.name == "testing"
        if "triton" in imported(path):
            assert path.parent.name == "triton"


def test_toolkit_uses_only_the_public_scorers() -> None:
    for path in (ROOT / "python" / "simdiff").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
                "simdiff_kernels"
            ):
                assert node.module == "simdiff_kernels", f"{path}: {node.module}"
            assert not isinstance(node, ast.ImportFrom) or node.level == 0, f"{path}: relative"


TOOLKIT = ROOT / "python" / "simdiff"
# Bottom to top: each may import what stands before it, and itself.
ROOMS = (
    "errors",
    "io",
    "data",
    "models",
    "surgery",
    "scoring",
    "evaluation",
    "speed",
    "planning",
    "sublayers",
    "checkpoints",
    "recovery",
    "comparison",
    "provenance",
    "report",
    "jobs",
    "api",
    "cli",
)


def room_of(path: Path) -> str:
    return path.relative_to(TOOLKIT).parts[0].removesuffix(".py")


def upward_imports(source: str, room: str) -> list[str]:
    """Modules of the toolkit that a file of a room must not import, lazy imports included."""
    found = [
        name
        for node in ast.walk(ast.parse(source))
        for name in (
            [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else []
        )
        if name.startswith("simdiff.")
    ]
    return [name for name in found if ROOMS.index(name.split(".")[1]) > ROOMS.index(room)]


def test_rooms_import_only_downwards() -> None:
    files = [path for path in TOOLKIT.rglob("*.py") if path != TOOLKIT / "__init__.py"]
    assert {room_of(path) for path in files} == set(ROOMS)
    upward = {
        str(path.relative_to(TOOLKIT)): names
        for path in files
        if (names := upward_imports(path.read_text(), room_of(path)))
    }
    assert upward == {}


def test_what_goes_upward_is_seen() -> None:
    lazy = "def f():\n    from simdiff.jobs.run import run\n    import simdiff.cli.options\n"
    assert upward_imports(lazy, "report") == ["simdiff.jobs.run", "simdiff.cli.options"]
    assert upward_imports(lazy, "cli") == []


def test_every_room_says_what_it_is_for() -> None:
    folders = [path for path in TOOLKIT.rglob("*") if path.is_dir() and path.name != "__pycache__"]
    public = {"score", "plan", "prune", "evaluate", "recover"}
    for folder in folders:
        words = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
        assert words.endswith("."), folder
        # A folder of that name would stand in the way of the public function.
        assert not (folder.parent == TOOLKIT and folder.name in public)
    assert len(list(TOOLKIT.glob("*.py"))) <= 14


# Tests of more than one module.
OF_SEVERAL = {
    "checkpoints/gguf/test_runtimes.py",  # cut files in other programs
    "checkpoints/test_transformers4.py",  # what is written, in other versions
    "cli/test_command.py",  # several commands, one after the other
    "cli/test_startup.py",  # what commands load
    "sublayers/test_families.py",  # all that a room does, for every family of models
    "surgery/test_families.py",
    "test_examples.py",
}


def test_tests_mirror_the_rooms() -> None:
    folder = ROOT / "tests" / "simdiff"
    found = {path.relative_to(folder) for path in folder.rglob("test_*.py")}
    apart = {
        str(path)
        for path in found
        if not (TOOLKIT / path.with_name(path.name.removeprefix("test_"))).exists()
    }
    assert apart == OF_SEVERAL
    # As a package it would stand for the toolkit on sys.path.
    assert not (folder / "__init__.py").exists()


def test_every_module_is_packaged(tmp_path: Path) -> None:
    """As `pip wheel` finds them, without the compiled part."""
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for name, folder in (("simdiff", TOOLKIT), ("simdiff_kernels", ROOT / "simdiff_kernels")):
        wanted = {path.relative_to(folder) for path in folder.rglob("*.py")} | {Path("py.typed")}
        packaged = {path.relative_to(tmp_path / name) for path in (tmp_path / name).rglob("*.*")}
        assert packaged == wanted


def test_only_csrc_torch_sees_torch() -> None:
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"}]
    assert len(sources) > 8
    for path in sources:
        headers = re.findall(r'#include [<"](torch|ATen|c10|pybind11)/', path.read_text())
        assert not headers or path.parent.name == "torch", f"{path}: {headers}"
