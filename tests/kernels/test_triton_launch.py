"""Compiled Triton kernels are launched directly: what that counts on, without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import simdiff_kernels.triton
from simdiff_kernels.triton.launch import WARP_SIZE

LAUNCH = sys.modules["simdiff_kernels.triton.launch"]


class Kernel:
    """Counts what is compiled, and remembers what each launch was given."""

    def __init__(self, name: str) -> None:
        self.__name__ = name
        self.options: list[dict[str, Any]] = []
        self.launches: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        def run(*arguments: Any, **options: Any) -> Any:
            index = len(self.options)
            self.options.append(options)
            self.launches.append((index, grid, arguments))
            return Compiled(index, self)

        return run


class Compiled:
    """What a launch returns."""

    def __init__(self, index: int, kernel: Kernel) -> None:
        self.index, self.kernel = index, kernel

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        return lambda *arguments: self.kernel.launches.append((self.index, grid, arguments))


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The devices that were made current, the last one at the end."""
    entered = [0]
    monkeypatch.setattr(LAUNCH, "_compiled", {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: entered[-1])

    class Device:
        def __init__(self, index: int) -> None:
            self.index = index

        def __enter__(self) -> None:
            entered.append(self.index)

        def __exit__(self, *error: object) -> None:
            entered.append(0)

    monkeypatch.setattr(torch.cuda, "device", Device)
    return entered


def on(index: int) -> Any:
    return SimpleNamespace(is_cuda=True, device=torch.device("cuda", index))


def test_kernels_are_compiled_once_for_types_constants_and_device(devices: list[int]) -> None:
    first, second = Kernel("first"), Kernel("second")
    grid = (7, 1, 1)
    calls = [
        (first, on(0), (1, True), (torch.float32,), 0),
        (first, on(0), (1, True), (torch.float32,), 0),
        (first, on(0), (2, True), (torch.float32,), 1),
        (first, on(0), (1, True), (torch.float16,), 2),
        (first, on(1), (1, True), (torch.float32,), 3),
        (first, on(1), (1, True), (torch.float32,), 3),
        (second, on(0), (1, True), (torch.float32,), 0),
        (first, on(0), (1, True), (torch.float32,), 0),
    ]
    for number, (kernel, tensor, constants, types, index) in enumerate(calls):
        LAUNCH.launch(kernel, grid, (tensor, number), constants, types, 128)
        assert kernel.launches[-1] == (index, grid, (tensor, number, *constants))
    assert len(first.options) == 4
    assert all(
        options == {"num_warps": 128 // WARP_SIZE, "enable_fp_fusion": True}
        for options in first.options
    )
    # The other device is made current, and left again; that of the caller is not touched.
    assert devices == [0, 1, 0, 1, 0]


def test_nothing_but_types_and_constants_decides_what_is_compiled() -> None:
    """Triton would compile for the values of arguments too, of which `launch` does not know."""
    code = """
from simdiff_kernels.triton.fold import _fold_kernel, _token_metrics_kernel
from simdiff_kernels.triton.row_sums import _row_sums_kernel
for kernel in (_fold_kernel, _token_metrics_kernel, _row_sums_kernel):
    for param in kernel.params:
        if not param.is_constexpr:
            assert param.do_not_specialize, param.name
            assert (param.name[:2] == "p_") != (param.annotation_type in ("i32", "i64")), param.name
"""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_launches_tell_what_the_kernels_depend_on(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Types of all pointers and, of row sums, alignment and strides: else the wrong one runs."""
    found: list[tuple[Any, ...]] = []
    for name in ("row_sums", "fold"):
        module = sys.modules[f"simdiff_kernels.triton.{name}"]
        monkeypatch.setattr(module, "launch", lambda *arguments: found.append(arguments))
    triton = simdiff_kernels.triton
    states = torch.ones(2, 3, 64, dtype=dtype)
    mask, sums = torch.ones(2, 3, dtype=torch.bool), torch.ones(1, 2, 3, 4).double()
    moments, counts = torch.zeros(1, 1, 3, 6).double(), torch.zeros(1, 1, 9).long()
    per_token = torch.empty(1, 6, 2, 3)
    for some in (None, mask):
        triton.row_sums(sums[0], states, states, some)
        triton.row_sums(sums[0], states.transpose(0, 1), states.transpose(0, 1), some)
        triton.row_sums(sums[0], states[..., 1:], states[..., 1:], some)
    for kinds in (None, mask, mask.byte()):
        for apart in (False, True):
            triton.fold(moments, counts, sums, 64, kinds, apart=apart)
    triton.fold(moments, counts, sums, 64, per_token=per_token)
    triton.fold(moments, counts, sums, 64, per_token=per_token.double())
    keys = [(kernel.__name__, constants, types) for kernel, _, _, constants, types, *_ in found]
    # Two folds with per_token are of a kernel that was there before.
    assert len(keys) == len(set(keys)) + 2
    assert all(dtype in types for name, _, types in keys if name == "_row_sums_kernel")
