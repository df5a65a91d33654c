"""Where there is no GPU, Triton kernels run in its interpreter; it must be chosen before import.

Test files are imported by `--import-mode=importlib`: two of them may have one name, and no folder
of tests comes onto `sys.path`. `tests` must never be there: `tests/simdiff` would stand for the
package `simdiff`, for which an editable install looks after all of `sys.path`. What several test
files need lies in the package `support`, for which pyproject.toml puts `tests/simdiff` on the path;
folders there are no packages and give way to any module of the same name.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

# The folder of a kernel for Hugging Face's hub, built: tests/kernels then tests it in the place of
# the installed package.
if "SIMDIFF_HUB_KERNEL" in os.environ:
    import hub_kernel

    hub_kernel.stand_in(Path(os.environ["SIMDIFF_HUB_KERNEL"]))

from simdiff_kernels import BACKENDS
from simdiff_kernels.backends import backend_status

pytest.register_assert_rewrite("support")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU, none is visible"))


# Why tests are skipped, by words of the reason: what is not there, as a whole and not case by case.
MISSING = {
    "a GPU": ("GPU",),
    "a Chromium browser": ("Chromium",),
    "llama.cpp": ("llama",),
    "mergekit": ("mergekit",),
    "transformers 4.57": ("transformers 4",),
    "an ARM processor, its emulator or compiler": ("neon", "aarch64"),
}


def missing_of(reason: str) -> str:
    return next(
        (name for name, words in MISSING.items() if any(w in reason for w in words)),
        "what a case of its own says",
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How much was not run for want of what, so that a skip cannot hide among hundreds."""
    counts: dict[str, int] = {}
    for report in terminalreporter.stats.get("skipped", ()):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        name = missing_of(reason)
        counts[name] = counts.get(name, 0) + 1
    for name, count in sorted(counts.items(), key=lambda entry: -entry[1]):
        terminalreporter.write_line(f"not run, for want of {name}: {count}")


def process_state() -> dict[str, object]:
    """What a test could leave behind for those after it, which then pass or fail by their order."""
    progress = sys.modules.get("simdiff.io.progress")
    return {
        "directory": Path.cwd(),
        "arguments": list(sys.argv),
        "threads": torch.get_num_threads(),
        "default dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "quiet": progress is not None and progress.console.quiet,
        **{f"${k}": v for k, v in os.environ.items() if not k.startswith(OF_LIBRARIES)},
    }


# Set by pytest and, once and for all, by libraries that are loaded late.
OF_LIBRARIES = ("PYTEST_", "TORCHINDUCTOR_", "_TORCHINDUCTOR_", "TRITON_", "KMP_", "HF_XET_")


@pytest.fixture(autouse=True)
def same_process_state() -> Iterator[None]:
    before = process_state()
    yield
    after = process_state()
    left = sorted(key for key in {*before, *after} if before.get(key) != after.get(key))
    assert left == [], "the test leaves this otherwise than it was"


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    status = {entry.name: entry for entry in backend_status()}[request.param]
    if not status.available and (request.param == "cuda" or "SIMDIFF_HUB_KERNEL" in os.environ):
        pytest.skip(f"backend {request.param}: {status.detail}")
    assert status.available, f"backend {request.param} must be testable: {status.detail}"
    return request.param


@pytest.fixture
def device(backend: str) -> str:
    """Where the backend runs: Triton on the GPU if there is one."""
    on_gpu = backend in ("triton", "cuda") and torch.cuda.is_available()
    return "cuda" if on_gpu else "cpu"
