"""Where there is no GPU, Triton kernels run in its interpreter; it must be chosen before import.

Test files are imported by `--import-mode=importlib`: two of them may have one name, and no folder
of tests comes onto `sys.path`. `tests` must never be there: `tests/simdiff` would stand for the
package `simdiff`, for which an editable install looks after all of `sys.path`. What several test
files need lies in the package `support`, for which pyproject.toml puts `tests/simdiff` on the path;
folders there are no packages and give way to any module of the same name.
"""

import os
import sys
from collections import Counter
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

# llama.cpp and mergekit, of `make test-loaders`: at the end, so that they replace nothing.
LOADERS = os.environ.get("SIMDIFF_LOADERS")
if LOADERS:
    sys.path.append(LOADERS)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU, none is visible"))


# Why tests may be skipped, by words of the reason: what is not there, as a whole.
MISSING = {
    "a GPU": ("GPU",),
    "a Chromium browser": ("Chromium",),
    "llama.cpp": ("llama",),
    "mergekit": ("mergekit",),
    "transformers 4.57": ("transformers 4",),
    "another processor": ("this processor",),
    "an emulator or compiler for ARM": ("aarch64",),
    "nvcc": ("nvcc", "_C_cuda is not built"),
    "the rights of root": ("only root",),
    "a quantiser's package": ("quantiser's package",),
}
# What .ci/run does without; it runs the loaders and transformers 4.57 by targets of their own.
ALLOWED = {"a GPU", "another processor", "the rights of root", "a quantiser's package"}
if os.environ.get("SIMDIFF_CUDA") == "0":
    ALLOWED |= {"nvcc"}
if not LOADERS:
    ALLOWED |= {"llama.cpp", "mergekit"}
if not os.environ.get("SIMDIFF_TRANSFORMERS4"):
    ALLOWED |= {"transformers 4.57"}


def missing_of(reason: str) -> str:
    return next(
        (name for name, words in MISSING.items() if any(w in reason for w in words)), reason
    )


def not_run(config: pytest.Config) -> Counter[str]:
    """For want of what tests were skipped, and how many."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    skipped = () if reporter is None else reporter.stats.get("skipped", ())
    return Counter(
        missing_of(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
        for report in skipped
    )


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """So that a skip cannot hide among hundreds."""
    for name, count in not_run(config).most_common():
        refused = os.environ.get("CI") == "true" and name not in ALLOWED
        word = ", which CI does not allow" if refused else ""
        terminalreporter.write_line(f"not run, for want of {name}: {count}{word}")


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """In CI, a skip for any other reason is a failure."""
    if os.environ.get("CI") == "true" and set(not_run(session.config)) - ALLOWED:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


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
