"""Which implementations exist, whether each can run here, and which one a device gets."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import os
import re
import warnings
from dataclasses import dataclass
from types import ModuleType

import torch

from .names import BACKENDS

# The fastest first; the first that is available for the tensor's device is the default.
_PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}

# What Triton supports (README of Triton 3.6 to 3.9).
_TRITON_CAPABILITY = (8, 0)

# The first torch whose stable ABI the compiled modules use; pyproject.toml asks for it.
_OLDEST_TORCH = (2, 10)


def check_torch(version: str) -> None:
    """Refuse a torch that is too old, in a sentence.

    Raises:
        ImportError: it is older than 2.10.
    """
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if numbers < _OLDEST_TORCH:
        raise ImportError(
            f"simdiff_kernels needs torch 2.10 or later, got {version}: pip install -U torch"
        )


check_torch(torch.__version__)

_load_problems: dict[str, str] = {}  # of a compiled module: why it is there and not loaded


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend can be used on this machine, and if not, why."""

    name: str
    """One of `BACKENDS`."""
    available: bool
    """Whether it can run on some device here."""
    detail: str
    """What it was built for or found, or what it lacks."""


def _load(name: str) -> ModuleType | None:
    """A compiled module; None where it was not built, or cannot be loaded, which is warned of."""
    try:
        return importlib.import_module(f".{name}", __package__)
    except ModuleNotFoundError:
        return None
    except ImportError as error:
        _load_problems[name] = f"simdiff_kernels.{name} cannot be loaded: {error}"
        warnings.warn(
            f"{_load_problems[name]}; a slower backend is used. "
            "pip install --force-reinstall --no-deps simdiff-kernels mends a broken file",
            stacklevel=3,
        )
        return None


@functools.cache
def load_extension() -> ModuleType | None:
    """The CPU module, or None where there is none; importing it registers its operators."""
    extension = _load("_C")
    wanted = os.environ.get("SIMDIFF_CPU_ISA")
    if extension is not None and wanted:
        try:
            extension.select_instruction_set(wanted)
        except ValueError as error:
            raise ValueError(f"SIMDIFF_CPU_ISA: {error}") from None
    return extension


@functools.cache
def load_cuda_extension() -> ModuleType | None:
    """The CUDA module, or None where there is none; importing it registers its operators."""
    return _load("_C_cuda")


def _no_cpu_module() -> str:
    return _load_problems.get("_C", "simdiff_kernels._C is not built")


def interpreting_triton() -> bool:
    """Whether Triton kernels run in Python on CPU tensors (`TRITON_INTERPRET=1`)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _cpu_status() -> BackendStatus:
    extension = load_extension()
    if extension is None:
        return BackendStatus("cpu", False, _no_cpu_module())
    runnable = ", ".join(extension.available_instruction_sets())
    detail = f"{extension.selected_instruction_set()} (runs here: {runnable})"
    return BackendStatus("cpu", True, detail)


def _gpu_names() -> str:
    names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    return ", ".join(sorted(names))


def _triton_status() -> BackendStatus:
    if importlib.util.find_spec("triton") is None:
        return BackendStatus("triton", False, "the package triton is not installed")
    version = f"triton {importlib.metadata.version('triton')}"
    if interpreting_triton():
        return BackendStatus("triton", True, f"{version}, interpreted (TRITON_INTERPRET=1)")
    return _gpu_status("triton", version)


def _cuda_status() -> BackendStatus:
    extension = load_cuda_extension()
    if extension is None:
        detail = "simdiff_kernels._C_cuda is not built (nvcc builds it; SIMDIFF_CUDA=1 insists)"
        return BackendStatus("cuda", False, _load_problems.get("_C_cuda", detail))
    targets = ", ".join(f"sm_{number}" for number in extension.compiled_architectures())
    release = extension.runtime_version
    built = f"built for {targets} with CUDA {release // 1000}.{release % 1000 // 10}"
    return _gpu_status("cuda", built)


def _gpu_status(name: str, what: str) -> BackendStatus:
    """Of a backend that is installed and needs a GPU that it can use."""
    if not torch.cuda.is_available():
        return BackendStatus(name, False, f"{what}, but no GPU is visible")
    problems = [_gpu_problem(name, index) for index in range(torch.cuda.device_count())]
    if all(problems):
        return BackendStatus(name, False, f"{what}, but {problems[0]}")
    excluded = "".join(f"; not on cuda:{i}: {why}" for i, why in enumerate(problems) if why)
    return BackendStatus(name, True, f"{what}, on {_gpu_names()}{excluded}")


@functools.cache
def _gpu_problem(backend: str, index: int) -> str:
    """Why a GPU backend that is installed cannot use this GPU; empty where it can."""
    if backend == "triton":
        capability = torch.cuda.get_device_capability(index)
        if torch.version.hip is None and capability < _TRITON_CAPABILITY:
            return (
                f"{torch.cuda.get_device_name(index)} is too old: Triton needs compute capability "
                f"8.0 or later, got {capability[0]}.{capability[1]}"
            )
        return ""
    if torch.version.hip is not None:
        return "this torch is built for ROCm"
    extension = load_cuda_extension()
    return "the module is not built" if extension is None else extension.device_problem(index)


def backend_status() -> list[BackendStatus]:
    """Whether each backend can be used on this machine, in the order of `BACKENDS`."""
    return [
        BackendStatus("reference", True, "plain PyTorch in float64, any device"),
        _cpu_status(),
        _triton_status(),
        _cuda_status(),
    ]


def num_parts(backend: str) -> int:
    """Among how many parts of a layer's state a backend deals out the tokens of an update.

    A GPU has a CTA (a block of threads) for each part: 64 of them fold 131072 tokens in some 5 us
    (predicted).
    """
    return 64 if backend in ("cuda", "triton") else 1


def block_scratch_words(backend: str, states: torch.Tensor, num_states: int, absolute: bool) -> int:
    """int64 words that an update of all blocks needs on this backend.

    Args:
        backend: as resolved.
        states: one of the hidden states of the update, `(..., hidden_size)`.
        num_states: how many there are.
        absolute: whether the absolute difference is measured.
    """
    if backend != "cuda":
        return 0
    extension = load_cuda_extension()
    if extension is None:
        return 0
    hidden_size = states.shape[-1]
    dtype = str(states.dtype).removeprefix("torch.")
    return extension.block_scratch_words(
        states.numel() // hidden_size, num_states, hidden_size, dtype, absolute
    )


def num_block_parts(backend: str) -> int:
    """Among how many parts of the state of all blocks of layers a backend deals out an update.

    A part is 87 KB for 33 hidden states. 8 on a GPU: so many times more CTAs
    (blocks of threads) fold.
    """
    return 8 if backend == "cuda" else 1


@functools.cache
def _problem(backend: str, device: torch.device) -> str:
    """Why the backend cannot run on tensors of this device; empty where it can."""
    if backend == "reference":
        return ""
    if backend == "cpu":
        if load_extension() is None:
            return _no_cpu_module()
        return "" if device.type == "cpu" else "it runs on cpu tensors"
    installed = {"triton": _triton_status, "cuda": _cuda_status}[backend]
    if device.type == "cpu" and backend == "triton" and interpreting_triton():
        return "" if importlib.util.find_spec("triton") else installed().detail
    status = installed()
    if device.type != "cuda":
        return f"it runs on cuda tensors ({status.detail})"
    if not status.available:
        return status.detail
    if not torch.cuda.is_available():  # interpreted Triton runs on CPU tensors
        return "no GPU is visible"
    index = torch.cuda.current_device() if device.index is None else device.index
    return _gpu_problem(backend, index)


@functools.cache
def default_backend(device: str | torch.device) -> str:
    """The fastest backend for tensors on `device` ("cpu", "cuda", "cuda:1", ...).

    A GPU that a built CUDA part cannot use is served by the next backend, with one warning that
    says why.
    """
    device = torch.device(device)
    for backend in _PREFERENCE.get(device.type, ("reference",)):
        problem = _problem(backend, device)
        if not problem:
            return backend
        if backend == "cuda" and torch.cuda.is_available() and load_cuda_extension() is not None:
            warnings.warn(
                f"simdiff_kernels: the CUDA kernels cannot run on {device}: {problem}; "
                "a slower backend is used",
                stacklevel=3,
            )
    return "reference"


@functools.cache
def usable_backends(device: str | torch.device) -> tuple[str, ...]:
    """All backends that can run on tensors of this device, the fastest first."""
    device = torch.device(device)
    preference = _PREFERENCE.get(device.type, ("reference",))
    return tuple(backend for backend in preference if not _problem(backend, device))


def resolve_backend(backend: str | None, device: str | torch.device) -> str:
    """Check a backend that the caller named, or choose the default.

    Raises:
        ValueError: unknown name, or one that cannot run on tensors of this device.
    """
    if backend is None:
        return default_backend(device)
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    problem = _problem(backend, torch.device(device))
    if problem:
        raise ValueError(f"backend {backend!r} cannot run on {device} tensors here: {problem}")
    return backend


# For torch.compile these are constants, not code to trace. This is all that
# torch.compiler.assume_constant_result does; calling it here would import torch._dynamo (~1.5 s).
resolve_backend._dynamo_marked_constant = True  # type: ignore[attr-defined]
num_parts._dynamo_marked_constant = True  # type: ignore[attr-defined]
block_scratch_words._dynamo_marked_constant = True  # type: ignore[attr-defined]
