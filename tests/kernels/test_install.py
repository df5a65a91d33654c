"""What `python -m simdiff_kernels` tells, and what is said where an installation is broken."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from simdiff_kernels import __main__ as command
from simdiff_kernels import backends
from simdiff_kernels import installation as told
from simdiff_kernels.backends import check_torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("version", ["1.13.1", "2.6.0+cu124", "2.9.1"])
def test_a_torch_too_old_is_refused_in_a_sentence(version: str) -> None:
    with pytest.raises(ImportError, match=r"needs torch 2.10 or later, got .*: pip install -U"):
        check_torch(version)


@pytest.mark.parametrize("version", ["2.10.0", "2.15.0a0+git123", "3.0.0"])
def test_a_later_torch_is_taken(version: str) -> None:
    check_torch(version)


def test_what_works_is_told_in_a_dozen_lines(capsys: pytest.CaptureFixture[str]) -> None:
    lines = told.describe_installation()
    assert 9 <= len(lines) <= 14
    assert lines[0].startswith("simdiff_kernels ")
    for line, name in zip(lines[3:7], ("reference", "cpu", "triton", "cuda"), strict=True):
        assert line.split()[0] == name
        assert line.split()[1] in ("works", "does")
    assert lines[-1] == "A bug report needs these lines."


def test_each_remedy_is_for_words_that_are_said() -> None:
    details = [
        "simdiff_kernels._C is not built",
        "the package triton is not installed",
        "built for sm_80, but CUDA driver version is insufficient for CUDA runtime version",
    ]
    advice = told.remedies(details)
    assert [line.split(":")[0] for line in advice] == [
        "CPU kernels",
        "GPU kernels without nvcc",
        "update the driver",
    ]
    assert told.remedies([]) == []
    assert told.remedies(["triton 3.9, but no GPU is visible"]) == []


def test_a_gpu_that_torch_does_not_see_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    statuses = [backends.BackendStatus("triton", False, "triton 3.9, but no GPU is visible")]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "path", [])
    (tmp_path / "version").touch()
    for driver, built, words in (
        ("none", None, None),
        ("version", None, "NVIDIA driver, but torch is built without CUDA: install"),
        ("version", "13.0", "torch, built for CUDA 13.0, sees no GPU: nvidia-smi"),
    ):
        monkeypatch.setattr(told, "NVIDIA_DRIVER", tmp_path / driver)
        monkeypatch.setattr(torch.version, "cuda", built)
        advice = told.installation_advice(statuses)
        assert (len(advice) == 1 and words in advice[0]) if words else advice == []


def test_an_import_that_fails_is_told_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> list[str]:
        raise ImportError("simdiff_kernels needs torch 2.10 or later, got 2.9.1")

    monkeypatch.setattr(told, "describe_installation", fail)
    assert command.main() == 1
    assert capsys.readouterr().out.startswith("Nothing works: simdiff_kernels needs torch 2.10")


def test_a_hidden_copy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("used", "hidden"):
        (tmp_path / name / "simdiff_kernels").mkdir(parents=True)
        (tmp_path / name / "simdiff_kernels" / "__init__.py").touch()
    folders = [str(tmp_path / name) for name in ("used", "empty", "hidden", "used")]
    assert [path.parent.name for path in told.copies(folders)] == ["used", "hidden"]
    monkeypatch.setattr(sys, "path", [*folders, *sys.path])
    assert any(
        f"{tmp_path}/hidden/simdiff_kernels" in line for line in told.describe_installation()[-3:]
    )


BROKEN = """
import importlib.machinery, pathlib, sys, warnings
package = pathlib.Path(sys.argv[1], "simdiff_kernels")
(package / "_C.abi3.so").write_bytes(b"not a library")
sys.path.insert(0, sys.argv[1])
import torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import simdiff_kernels.ops
print("\\n".join(str(warning.message) for warning in caught))
from simdiff_kernels import default_backend, installation as told
print(default_backend("cpu"))
print("\\n".join(told.describe_installation()))
for name in [name for name in sys.modules if name.startswith("simdiff_kernels")]:
    del sys.modules[name]
try:
    import simdiff_kernels.ops
except ImportError as error:
    print(error)
"""


def test_a_broken_file_and_a_second_copy_are_told_in_sentences(tmp_path: Path) -> None:
    (tmp_path / "simdiff_kernels").mkdir()
    for path in (ROOT / "simdiff_kernels").iterdir():
        if path.name not in ("__pycache__", "_C.abi3.so", "_C_cuda.abi3.so"):
            (tmp_path / "simdiff_kernels" / path.name).symlink_to(path)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-c", BROKEN, str(tmp_path)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "simdiff_kernels._C cannot be loaded: " in result.stdout
    assert "a slower backend is used. pip install --force-reinstall" in result.stdout
    assert "\nreference\n" in result.stdout
    assert "To do: reinstall: pip install --force-reinstall" in result.stdout
    assert "another copy of it has registered its operators" in result.stdout
    assert str(tmp_path) in result.stdout.splitlines()[-1]


def test_the_oldest_torch_is_that_of_the_package() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert f'dependencies = ["torch>={backends._OLDEST_TORCH[0]}.{backends._OLDEST_TORCH[1]}"]' in (
        text
    )
