"""Which backend a GPU gets, by what is built and how old it is; no GPU is needed to decide."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch

from simdiff_kernels import backends
from simdiff_kernels.backends import backend_status, default_backend, resolve_backend

NO_IMAGE = "no kernel image is available for execution on the device"


def cuda_module(problems: list[str]) -> SimpleNamespace:
    """What _C_cuda tells of one GPU for each entry of `problems`."""
    return SimpleNamespace(
        compiled_architectures=lambda: [80, 90],
        runtime_version=13000,
        scratch_words=13313,
        device_problem=lambda index: problems[index],
    )


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch):
    """Pretend to have GPUs of these compute capabilities, and this CUDA module."""
    caches = [
        value for value in vars(backends).values() if hasattr(value, "cache_clear")
    ]  # what was decided for the real machine

    def pretend(capabilities: list[tuple[int, int]], module: SimpleNamespace | None) -> None:
        for function in caches:
            function.cache_clear()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
        monkeypatch.setattr(backends, "load_cuda_extension", lambda: module)
        monkeypatch.setattr(backends, "interpreting_triton", lambda: False)

    yield pretend
    monkeypatch.undo()
    for function in caches:
        function.cache_clear()


def test_cuda_comes_first_where_it_was_built(gpus) -> None:
    gpus([(9, 0)], cuda_module([""]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert default_backend("cuda") == default_backend("cuda:0") == "cuda"
    status = {entry.name: entry for entry in backend_status()}["cuda"]
    assert status.detail == "built for sm_80, sm_90 with CUDA 13.0, on GPU 0"


def test_triton_serves_where_cuda_was_not_built(gpus) -> None:
    gpus([(8, 0)], None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing to warn of
        assert default_backend("cuda:0") == "triton"
    with pytest.raises(ValueError, match=r"backend 'cuda' cannot run .*_C_cuda is not built"):
        resolve_backend("cuda", "cuda:0")


def test_a_gpu_too_old_is_told_and_served_by_the_next_backend(gpus) -> None:
    gpus([(9, 0), (8, 0), (7, 0)], cuda_module(["", NO_IMAGE, NO_IMAGE]))
    assert default_backend("cuda:0") == "cuda"
    with pytest.warns(UserWarning, match=rf"cannot run on cuda:1: {NO_IMAGE}"):
        assert default_backend("cuda:1") == "triton"
    with pytest.warns(UserWarning, match="cannot run on cuda:2"):
        assert default_backend("cuda:2") == "reference"
    with pytest.raises(ValueError, match=f"'cuda' cannot run on cuda:1 tensors here: {NO_IMAGE}"):
        resolve_backend("cuda", torch.device("cuda:1"))
    with pytest.raises(ValueError, match="GPU 2 is too old: Triton needs compute capability 8.0"):
        resolve_backend("triton", "cuda:2")
    status = {entry.name: entry for entry in backend_status()}["cuda"]
    assert status.available
    assert f"not on cuda:1: {NO_IMAGE}; not on cuda:2" in status.detail


def test_gpu_backends_refuse_cpu_tensors(gpus) -> None:
    gpus([(9, 0)], cuda_module([""]))
    for backend in ("cuda", "triton"):
        with pytest.raises(ValueError, match=f"'{backend}' cannot run on cpu.*runs on cuda tensor"):
            resolve_backend(backend, "cpu")
    with pytest.raises(ValueError, match="'cpu' cannot run on cuda:0 tensors here: it runs on cpu"):
        resolve_backend("cpu", "cuda:0")


def test_the_built_module_tells_what_it_is_for() -> None:
    module = pytest.importorskip("simdiff_kernels._C_cuda", reason="_C_cuda is not built")
    assert module.compiled_architectures() == sorted(module.compiled_architectures())
    assert 80 in module.compiled_architectures()
    for operator in ("token_metrics.cuda", "accumulate.cuda"):
        name = f"simdiff_kernels::{operator}"
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")
        assert not torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")
    if not torch.cuda.is_available():
        assert "CUDA" in module.device_problem(0)
        states = torch.ones(2, 4)
        with pytest.raises(ValueError, match="backend 'cuda' cannot run on cpu tensors"):
            resolve_backend("cuda", states.device)
