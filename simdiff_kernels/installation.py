"""What works on this machine, what to do about what does not, and what a bug report needs."""

from __future__ import annotations

import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .backends import BackendStatus

# Of what a backend says it lacks, and what brings it. CUDA's words come from its runtime.
REMEDIES = (
    ("_C is not built", "CPU kernels: install a wheel, or a C++ compiler and install again"),
    ("cannot be loaded", "reinstall: pip install --force-reinstall --no-deps simdiff-kernels"),
    ("package triton is not", "GPU kernels without nvcc: pip install 'simdiff-kernels[triton]'"),
    ("driver version is insufficient", "update the driver: it is older than the CUDA built with"),
    ("no kernel image", "build for this GPU: SIMDIFF_CUDA_ARCHITECTURES, docs/install.md"),
    ("built without CUDA", "install a torch that is built for CUDA: https://pytorch.org"),
    ("too old", "this GPU is scored by plain PyTorch, or by CUDA kernels built for it"),
)

# Where a driver tells that it is loaded, whatever torch sees.
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


def copies(folders: list[str]) -> list[Path]:
    """The folders of this package that these places of imports hold, the first of which is used."""
    found = [Path(folder or ".", "simdiff_kernels").resolve() for folder in folders]
    return list(dict.fromkeys(path for path in found if (path / "__init__.py").is_file()))


def remedies(details: list[str]) -> list[str]:
    """What to do about what the backends that are not available say they lack."""
    return [advice for words, advice in REMEDIES if any(words in detail for detail in details)]


def installation_advice(statuses: list[BackendStatus]) -> list[str]:
    """What the user can do so that more works, or works as meant; empty where nothing is amiss."""
    import torch

    told = remedies([status.detail for status in statuses if not status.available])
    if not torch.cuda.is_available() and NVIDIA_DRIVER.exists():
        built = torch.version.cuda or torch.version.hip
        told.append(
            f"this machine has an NVIDIA driver, but torch, built for CUDA {built}, sees no GPU: "
            "nvidia-smi tells what the driver supports, CUDA_VISIBLE_DEVICES may hide GPUs"
            if built
            else "this machine has an NVIDIA driver, but torch is built without CUDA: install one "
            "that is built for it, https://pytorch.org"
        )
    elif torch.cuda.is_available() and not any(s.available for s in statuses[2:]):
        told.append("until then GPU tensors are scored by plain PyTorch, which is slower")
    hidden = copies(sys.path)[1:]
    if hidden:
        paths = ", ".join(map(str, hidden))
        told.append(f"remove a copy: {paths} is hidden by the one that is used")
    return told


def version_of(package: str) -> str:
    """The version of an installed distribution, or "not installed"."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _gpus() -> str:
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        return "none visible" if built else "none visible (this torch is built without CUDA)"
    return ", ".join(
        "{} (compute capability {}.{})".format(
            torch.cuda.get_device_name(index), *torch.cuda.get_device_capability(index)
        )
        for index in range(torch.cuda.device_count())
    )


def _chosen() -> str:
    import torch

    from .backends import default_backend

    chosen = f"Chosen for CPU tensors: {default_backend('cpu')}"
    if torch.cuda.is_available():
        chosen += f"; for CUDA tensors: {default_backend('cuda')}"
    return chosen


def describe_installation(more: tuple[str, ...] = ()) -> list[str]:
    """What works here, what to do about what does not: a dozen lines, all that a bug report needs.

    Args:
        more: lines on what stands on this package, told after those on the machine.
    """
    import torch

    from . import __version__
    from .backends import backend_status

    statuses = backend_status()
    here = (copies(sys.path) or [Path(__file__).resolve().parent])[0]
    return [
        f"simdiff_kernels {__version__} in {here}",
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"triton {version_of('triton')}, {platform.platform()}",
        *more,
        f"GPU: {_gpus()}; torch's CUDA: {torch.version.cuda or 'none'}",
        *(f"{s.name:10}{'works' if s.available else 'does not':9} {s.detail}" for s in statuses),
        _chosen(),
        *(f"To do: {line}" for line in installation_advice(statuses)),
        "A bug report needs these lines.",
    ]
