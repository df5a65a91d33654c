"""The kernel for Hugging Face's hub: laid out, built as its builder does, and run."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import hub_kernel
import pytest
import torch

import simdiff_kernels
from simdiff_kernels import _ops

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "kernel"
    hub_kernel.lay_out(folder, "acme/simdiff-kernels")
    return folder


@pytest.fixture(scope="module")
def build(tree: Path) -> Path:
    return hub_kernel.build_local(tree, "cpu", "1234567")


@pytest.fixture(scope="module")
def kernel(build: Path) -> ModuleType:
    return hub_kernel.load(build)


def test_it_stands_beside_the_installed_package(kernel: ModuleType, build: Path) -> None:
    namespace = "_simdiff_kernels_cpu_1234567"
    assert kernel.__name__ == namespace
    before, after = torch.randn(2, 3, 7, 64)
    theirs = kernel.token_metrics(before, after)
    ours = simdiff_kernels.token_metrics(before, after, backend="reference")
    assert type(theirs) is not type(ours)
    assert all(map(torch.equal, theirs, ours))
    mine, other = torch.ops.simdiff_kernels, getattr(torch.ops, namespace)
    assert other.token_metrics.reference._schema.name == f"{namespace}::token_metrics"
    assert mine.token_metrics.reference._schema.name == "simdiff_kernels::token_metrics"
    assert _ops.ops is mine
    loaded = {n: m for n, m in sys.modules.items() if n.startswith(namespace)}
    assert len(loaded) >= 8
    assert all(Path(m.__file__ or "").is_relative_to(build) for m in loaded.values())


def test_two_builds_stand_beside_each_other(tree: Path, kernel: ModuleType) -> None:
    second = hub_kernel.load(hub_kernel.build_local(tree, "rocm", "7654321"))
    states = torch.randn(2, 3, 8)
    both = (one.token_metrics(*states) for one in (kernel, second))
    assert all(map(torch.equal, *both))
    assert second.ops.ops.fold is not kernel.ops.ops.fold


def test_it_passes_the_tests_of_the_operators(build: Path) -> None:
    chosen = "(opcheck and bfloat16) or tolerate or nonfinite_states"
    run = [sys.executable, "-m", "pytest", "-q", "-rN", "-p", "no:cacheprovider", "-k", chosen]
    run += [f"tests/kernels/test_{name}.py" for name in ("operators", "token_metrics")]
    # A build lacks compiled modules, so some tests are skipped that CI does not do without.
    environment = os.environ | {"SIMDIFF_HUB_KERNEL": str(build), "CI": ""}
    done = subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.findall(r"(\d+) passed", done.stdout)[0]) == 14


def test_what_the_builder_asks_of_the_sources(tree: Path) -> None:
    """Relative imports, torch and the standard library; no `_ops.py`; `__all__` as a list."""
    package = tree / "torch-ext" / "simdiff_kernels"
    allowed = {"torch", "triton"} | sys.stdlib_module_names
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                assert (node.module or "").split(".")[0] in allowed, path
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed, path
    assert not (package / "_ops.py").exists()
    assert not (package / "simdiff_kernels").exists()
    names = [
        ast.literal_eval(node.value)
        for node in ast.parse((package / "__init__.py").read_text()).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    assert names == [simdiff_kernels.__all__]


def test_the_builders_file_without_compiled_code(tree: Path) -> None:
    content = tomllib.loads((tree / "build.toml").read_text())
    assert content == {
        "general": {
            "name": "simdiff-kernels",
            "version": 0,
            "edition": 5,
            "license": "Apache-2.0",
            "backends": ["cpu", "cuda", "rocm"],
            "hub": {"repo-id": "acme/simdiff-kernels"},
        },
        "torch-noarch": {},
    }
    assert not (tree / "csrc").exists()


def test_every_source_of_a_compiled_build_is_named_and_there(tmp_path: Path) -> None:
    hub_kernel.lay_out(tmp_path / "kernel", "acme/simdiff-kernels", compiled=True)
    content = tomllib.loads((tmp_path / "kernel" / "build.toml").read_text())
    assert content["torch"] == {"src": [], "stable-abi": {"cpu": "2.11", "cuda": "2.11"}}
    named = {file for section in content["kernel"].values() for file in section["src"]}
    there = {
        path.relative_to(tmp_path / "kernel").as_posix()
        for path in (tmp_path / "kernel" / "csrc").rglob("*.*")
    }
    files = [path for path in (ROOT / "csrc").rglob("*.*") if path.suffix != ".map"]
    wanted = {path.relative_to(ROOT).as_posix() for path in files}
    assert named == there == {path for path in wanted if not path.startswith("csrc/tests/")}
    for section in content["kernel"].values():
        assert "-DSIMDIFF_NAMESPACE=TORCH_EXTENSION_NAME" in section["cxx-flags"]
    for name, text in hub_kernel.MODULES.items():
        path = tmp_path / "kernel" / "torch-ext" / "simdiff_kernels" / name
        assert compile(path.read_text(), name, "exec") == compile(text, name, "exec")


@pytest.mark.parametrize("source", ["module.cpp", "cuda_module.cpp"])
def test_modules_compile_for_the_limited_api_of_the_builder(source: str) -> None:
    """The oldest one, which has no PY_SSIZE_T_CLEAN."""
    flags = [*hub_kernel.FLAGS, "-DTORCH_EXTENSION_NAME=_simdiff_kernels_cpu_1234567"]
    flags += ["-DPy_LIMITED_API=3", f"-I{sysconfig.get_path('include')}"]
    path = ROOT / "csrc" / "torch" / source
    command = ["g++", "-std=c++17", "-fsyntax-only", "-w", *flags, str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_benchmark_class(
    tree: Path, kernel: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `kernels benchmark` runs it; the package `kernels` need not be there."""
    benchmark = ModuleType("kernels.benchmark")
    vars(benchmark)["Benchmark"] = object
    monkeypatch.setitem(sys.modules, "kernels", ModuleType("kernels"))
    monkeypatch.setitem(sys.modules, "kernels.benchmark", benchmark)
    content: dict[str, object] = {}
    exec((tree / "benchmarks" / "benchmark.py").read_text(), content)
    running = content["ScorersBenchmark"]()  # type: ignore[operator]
    running.kernel, running.device = kernel, "cpu"
    running.setup()
    for workload in ("token_metrics", "running_scores"):
        getattr(running, f"benchmark_{workload}")()
        wanted = getattr(running, f"verify_{workload}")()
        assert torch.allclose(running.out, wanted, atol=1e-2)
        running.out = running.out * 1.001
        with pytest.raises(AssertionError):
            getattr(running, f"verify_{workload}")()


def test_a_folder_with_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    (tmp_path / "mine.txt").touch()
    with pytest.raises(SystemExit, match="must not hold files yet"):
        hub_kernel.lay_out(tmp_path, "acme/simdiff-kernels")
    with pytest.raises(SystemExit, match="--repo-id must be OWNER/NAME, got 'acme'"):
        hub_kernel.lay_out(tmp_path / "new", "acme")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".git", "mine.txt"]
