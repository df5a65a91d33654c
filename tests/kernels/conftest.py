"""Backends that have the operator of all blocks."""

from __future__ import annotations

import os

import pytest
import torch

from simdiff_kernels import ops


@pytest.fixture(params=["reference", "cpu", "cuda"])
def block_backend(request: pytest.FixtureRequest) -> str:
    name = request.param
    device = torch.device("cuda" if name == "cuda" else "cpu")
    if not ops.has_implementation("accumulate_blocks", name, device):
        assert name == "cuda" or "SIMDIFF_HUB_KERNEL" in os.environ
        pytest.skip(f"backend {name} has no accumulate_blocks")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("backend cuda: no GPU is visible")
    return name
