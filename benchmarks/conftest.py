"""Options and fixtures of the suite: `pytest benchmarks --benchmark-only`, or `make bench`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import provenance
import pytest
import report
import torch

from simdiff.io.machine import describe_machine


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
        machine=describe_machine(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        cuda=torch.version.cuda,
        environment={
            name: os.environ[name]
            for name in ("SIMDIFF_CPU_ISA", "OMP_NUM_THREADS")
            if name in os.environ
        },
    )


class Suite:
    """Which cases there are, and what was measured on: at the start of the run and at its end."""

    def __init__(self) -> None:
        self.cases: list[str] = []
        self.left_out: list[str] = []
        self.origin = provenance.origin(report.SOURCES)

    def pytest_deselected(self, items: list[pytest.Item]) -> None:
        self.left_out += [item.nodeid for item in items]

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        self.cases = [item.nodeid for item in items]


SUITE = pytest.StashKey[Suite]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[SUITE] = Suite()
    config.pluginmanager.register(config.stash[SUITE])


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict[str, Any]) -> None:
    """Only the commit and whether the tree was clean, before and after."""
    origin = _lasting(config.stash[SUITE].origin)
    commit_info.clear()
    commit_info.update(id=origin["commit"], dirty=not origin["clean"])


def _lasting(origin: dict[str, Any]) -> dict[str, Any]:
    """Not clean where anything changed while the suite ran."""
    same = provenance.origin(report.SOURCES) == origin
    return origin | {"clean": bool(origin["clean"] and same)}


def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]
) -> None:
    """Which cases are missing: left out on the command line, skipped, failed."""
    suite, folder = config.stash[SUITE], Path(__file__).parent
    done = {case["name"] for case in output_json["benchmarks"]}
    known = (*suite.cases, *suite.left_out)
    missing = {case.partition("::")[2] for case in known} - done
    collected = {case.partition("::")[0].rpartition("/")[2] for case in known}
    missing |= {file.name for file in folder.glob("test_*.py")} - collected
    missing |= {f"all but {word.partition('::')[2]}" for word in config.args if "::" in word}
    quick = bool(config.getoption("--quick"))
    words = [word for word in config.invocation_params.args if "benchmark-json" not in word]
    output_json["suite"] = {
        "quick": quick,
        "cases": len(done),
        "missing": sorted(missing),
        "command": provenance.command_line("pytest", words),
        "origin": _lasting(suite.origin),
    }
