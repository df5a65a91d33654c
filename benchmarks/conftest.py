"""Options and fixtures of the suite: `pytest benchmarks --benchmark-only`, or `make bench`."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from simdiff.machine import describe_machine


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("simdiff-kernels")
    group.addoption("--quick", action="store_true", help="tiny cases, one round: does it run?")


@pytest.fixture(scope="session")
def quick(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--quick"))


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    """A case must not be slowed down by recompilations for earlier ones."""
    torch._dynamo.reset()


def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, Any]
) -> None:
    """What a reader needs to tell machines apart, and nothing that names this one."""
    machine_info.clear()
    machine_info.update(
        machine=describe_machine(), threads=torch.get_num_threads(), torch=torch.__version__,
        cuda=torch.version.cuda, environment={
            name: os.environ[name] for name in ("SIMDIFF_CPU_ISA", "OMP_NUM_THREADS")
            if name in os.environ
        },
    )  # fmt: skip


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict[str, Any]) -> None:
    """Only the commit and whether the tree was clean."""
    kept = {name: commit_info.get(name) for name in ("id", "dirty")}
    commit_info.clear()
    commit_info.update(kept)
