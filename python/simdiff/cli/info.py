"""`simdiff info`."""

from __future__ import annotations

import argparse
from typing import Any

from simdiff.cli.options import show
from simdiff.cli.parsing import CommandParser

TEXT = "What is installed and built here; with --backends, which backends can score and why not."


def add(sub: CommandParser) -> None:
    """The options of `simdiff info`."""
    sub.group("what is told").add_argument(
        "--backends",
        action="store_true",
        help="load torch and ask each backend whether it can run here; tells the chosen ones",
    )


def needs_torch(arguments: argparse.Namespace) -> bool:
    """What is installed can be told without loading it."""
    return bool(arguments.backends)


def run(arguments: argparse.Namespace) -> None:
    """Run `simdiff info`."""
    from simdiff.io.machine import describe_processor, gpu_names

    content: dict[str, Any] = {
        "version": _version("simdiff-kernels"),
        "torch": _version("torch"),
        "transformers": _version("transformers"),
        "machine": ", ".join([describe_processor(), *gpu_names()]),
        "built": _built(),
    }
    if arguments.backends:
        return _with_backends(arguments, content)
    show(
        arguments,
        content,
        *_head(content),
        *(f"{name}: {state}" for name, state in content["built"].items()),
        "Which of them can score here: simdiff info --backends",
    )


def _with_backends(arguments: argparse.Namespace, content: dict[str, Any]) -> None:
    from dataclasses import asdict

    import torch

    from simdiff.io.machine import describe_machine
    from simdiff.report.terminal.tables import backends_table
    from simdiff_kernels import backend_status, default_backend

    statuses = backend_status()
    defaults = {device: default_backend(device) for device in ("cpu", "cuda")}
    content |= {
        "machine": describe_machine(),
        "threads": torch.get_num_threads(),
        "default_backend": defaults,
        "backends": [asdict(status) for status in statuses],
    }
    show(
        arguments,
        content,
        *_head(content),
        f"{content['threads']} torch threads",
        backends_table(statuses),
        f"Chosen for CPU tensors: {defaults['cpu']}; for CUDA tensors: {defaults['cuda']}",
    )


def _head(content: dict[str, Any]) -> list[str]:
    packages = ", ".join(
        f"{name} {content[key] or 'not installed'}"
        for name, key in (
            ("simdiff-kernels", "version"),
            ("torch", "torch"),
            ("transformers", "transformers"),
        )
    )
    return [packages, content["machine"]]


def _built() -> dict[str, str]:
    """Of each backend: whether its part is built or installed, told without loading it."""
    from importlib.util import find_spec

    cpu = find_spec("simdiff_kernels._C") is not None
    cuda = find_spec("simdiff_kernels._C_cuda") is not None
    triton = _version("triton")
    return {
        "reference": "plain PyTorch",
        "cpu": "built" if cpu else "not built",
        "triton": f"triton {triton}" if triton else "the package triton is not installed",
        "cuda": "built" if cuda else "not built",
    }


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None
