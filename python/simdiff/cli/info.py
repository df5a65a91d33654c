"""`simdiff info`."""

from __future__ import annotations

import argparse

from simdiff.cli.options import show

TEXT = "Which backends can score here, and on what they run."


def add(sub: argparse.ArgumentParser) -> None:
    """The options of `simdiff info`."""


def run(arguments: argparse.Namespace) -> None:
    """Run `simdiff info`."""
    from dataclasses import asdict
    from importlib.metadata import version

    import torch

    from simdiff.io.machine import describe_machine
    from simdiff.report.terminal.tables import backends_table
    from simdiff_kernels import backend_status, default_backend

    statuses = backend_status()
    defaults = {device: default_backend(device) for device in ("cpu", "cuda")}
    content = {
        "version": version("simdiff-kernels"),
        "torch": torch.__version__,
        "machine": describe_machine(),
        "threads": torch.get_num_threads(),
        "default_backend": defaults,
        "backends": [asdict(status) for status in statuses],
    }
    show(
        arguments,
        content,
        f"simdiff-kernels {content['version']}, torch {content['torch']}",
        f"{content['machine']}; {content['threads']} torch threads",
        backends_table(statuses),
        f"Chosen for CPU tensors: {defaults['cpu']}; for CUDA tensors: {defaults['cuda']}",
    )
