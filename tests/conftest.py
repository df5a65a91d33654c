"""Where there is no GPU, Triton kernels run in its interpreter; it must be chosen before import."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

from simdiff_kernels import BACKENDS
from simdiff_kernels.backends import backend_status


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU, none is visible"))


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    status = {entry.name: entry for entry in backend_status()}[request.param]
    if request.param == "cuda" and not status.available:
        pytest.skip(f"backend cuda: {status.detail}")
    assert status.available, f"backend {request.param} must be testable: {status.detail}"
    return request.param


@pytest.fixture
def device(backend: str) -> str:
    """Where the backend runs: Triton on the GPU if there is one."""
    on_gpu = backend in ("triton", "cuda") and torch.cuda.is_available()
    return "cuda" if on_gpu else "cpu"
