"""`python -m simdiff_kernels`: what works on this machine, what to do about what does not."""

from __future__ import annotations

import platform
import sys
from importlib import metadata
from pathlib import Path

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


def copies(folders: list[str]) -> list[Path]:
    """The folders of this package that these places of imports hold, the first of which is used."""
    found = [Path(folder or ".", "simdiff_kernels").resolve() for folder in folders]
    return list(dict.fromkeys(path for path in found if (path / "__init__.py").is_file()))


def remedies(details: list[str]) -> list[str]:
    """What to do about what the backends that are not available say they lack."""
    return [advice for words, advice in REMEDIES if any(words in detail for detail in details)]


def _version(package: str) -> str:
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


def lines() -> list[str]:
    """What is told, a dozen lines."""
    import torch

    from . import __version__
    from .backends import backend_status, default_backend

    statuses = backend_status()
    here = copies(sys.path) or [Path(__file__).resolve().parent]
    told = [
        f"simdiff_kernels {__version__} in {here[0]}",
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"triton {_version('triton')}, {platform.platform()}",
        f"GPU: {_gpus()}; torch's CUDA: {torch.version.cuda or 'none'}",
        *(f"{s.name:10}{'works' if s.available else 'does not':9} {s.detail}" for s in statuses),
        f"Chosen for CPU tensors: {default_backend('cpu')}; for CUDA tensors: "
        f"{default_backend('cuda')}",
    ]
    told += [f"To do: {line}" for line in remedies([s.detail for s in statuses if not s.available])]
    if len(here) > 1:
        others = ", ".join(str(path) for path in here[1:])
        told.append(f"To do: remove a copy: {others} is hidden by the one that is used")
    return [*told, "A bug report needs these lines."]


if __name__ == "__main__":
    print("\n".join(lines()))
