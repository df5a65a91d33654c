"""Which implementations exist, whether each can run here, and which one a device gets."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import os
from dataclasses import dataclass
from types import ModuleType

import torch

BACKENDS = ("reference", "cpu", "triton")

# The fastest first; the first that is available for the tensor's device is the default.
_PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("triton", "reference")}


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend can be used here, and if not, why."""

    name: str
    available: bool
    detail: str


@functools.cache
def load_extension() -> ModuleType | None:
    """The compiled module, or None where it was not built; importing it registers its operators."""
    try:
        extension = importlib.import_module("simdiff_kernels._C")
    except ImportError:
        return None
    wanted = os.environ.get("SIMDIFF_CPU_ISA")
    if wanted:
        try:
            extension.select_instruction_set(wanted)
        except ValueError as error:
            raise ValueError(f"SIMDIFF_CPU_ISA: {error}") from None
    return extension


def interpreting_triton() -> bool:
    """Whether Triton kernels run in Python on CPU tensors (`TRITON_INTERPRET=1`)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _cpu_status() -> BackendStatus:
    extension = load_extension()
    if extension is None:
        return BackendStatus("cpu", False, "simdiff_kernels._C is not built")
    runnable = ", ".join(extension.available_instruction_sets())
    detail = f"{extension.selected_instruction_set()} (runs here: {runnable})"
    return BackendStatus("cpu", True, detail)


def _triton_status() -> BackendStatus:
    if importlib.util.find_spec("triton") is None:
        return BackendStatus("triton", False, "the package triton is not installed")
    version = importlib.metadata.version("triton")
    if interpreting_triton():
        return BackendStatus("triton", True, f"triton {version}, interpreted (TRITON_INTERPRET=1)")
    if not torch.cuda.is_available():
        return BackendStatus("triton", False, f"triton {version}, but no GPU is visible")
    names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    return BackendStatus("triton", True, f"triton {version} on {', '.join(sorted(names))}")


def backend_status() -> list[BackendStatus]:
    """One entry for each backend, in the order of `BACKENDS`."""
    return [
        BackendStatus("reference", True, "plain PyTorch in float64, any device"),
        _cpu_status(),
        _triton_status(),
    ]


@functools.cache
def _runs_on(backend: str, device_type: str) -> bool:
    if backend == "reference":
        return True
    if backend == "cpu":
        return device_type == "cpu" and load_extension() is not None
    if importlib.util.find_spec("triton") is None:
        return False
    return device_type == "cuda" or (device_type == "cpu" and interpreting_triton())


@functools.cache
def default_backend(device_type: str) -> str:
    """The fastest backend for tensors on `device_type` ("cpu", "cuda", ...)."""
    for backend in _PREFERENCE.get(device_type, ("reference",)):
        if _runs_on(backend, device_type):
            return backend
    return "reference"


def resolve_backend(backend: str | None, device_type: str) -> str:
    """Check a backend that the caller named, or choose the default.

    Raises:
        ValueError: unknown name, or one that cannot run on tensors of this device.
    """
    if backend is None:
        return default_backend(device_type)
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if not _runs_on(backend, device_type):
        status = {entry.name: entry for entry in backend_status()}[backend]
        raise ValueError(
            f"backend {backend!r} cannot run on {device_type} tensors here: {status.detail}"
        )
    return backend


# For torch.compile the choice is a constant, not code to trace. This is all that
# torch.compiler.assume_constant_result does; calling it here would import torch._dynamo (~1.5 s).
resolve_backend._dynamo_marked_constant = True  # type: ignore[attr-defined]
