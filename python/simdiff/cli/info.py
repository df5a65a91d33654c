"""`simdiff info`."""

from __future__ import annotations

import argparse
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from simdiff.cli.parsing import CommandParser
from simdiff.errors import SimdiffError

TEXT = "What works on this machine and what to do about what does not; a bug report needs it."

NEEDED = ("transformers", "tokenizers", "safetensors", "huggingface_hub", "numpy", "gguf")
# What an extra brings, by the package to look for.
EXTRAS = {
    "lm_eval": ("eval", "simdiff eval --tasks"),
    "peft": ("recover", "simdiff recover by training"),
    "pyarrow": ("demo", "the demo's text, Parquet and Arrow files"),
}


def add(sub: CommandParser) -> None:
    """The options of `simdiff info`: none but the general ones."""


def needs_torch(arguments: argparse.Namespace) -> bool:
    """It is loaded here, without transformers, which takes longer."""
    return False


def run(arguments: argparse.Namespace) -> None:
    """Run `simdiff info`."""
    from simdiff.io.progress import step

    try:
        with step("load torch"):
            import torch  # noqa: F401

            from simdiff_kernels import ops  # noqa: F401
        content = _content() if arguments.json else {}
        lines = [] if arguments.json else _lines()
    except ImportError as error:  # no torch, or one that is too old
        raise SimdiffError(f"nothing works here: {error}") from None
    except ValueError as error:
        if not str(error).startswith("SIMDIFF_"):  # an environment variable of ours
            raise
        raise SimdiffError(str(error)) from None
    if arguments.json:
        import json

        print(json.dumps(content, indent=1))
    else:
        print("\n".join(lines))


def _lines() -> list[str]:
    from simdiff.io.machine import describe_processor
    from simdiff_kernels import describe_installation

    needed = ", ".join(f"{name} {_version(name) or 'not installed'}" for name in NEEDED)
    extras = {name: _version(name) for name in EXTRAS}
    there = [f"{name} {found}" for name, found in extras.items() if found]
    missing = [
        f"without {name}, for {use}: pip install 'simdiff-kernels[{extra}]'"
        for name, (extra, use) in EXTRAS.items()
        if not extras[name]
    ]
    return describe_installation((describe_processor(), ", ".join([needed, *there]), *missing))


def _content() -> dict[str, Any]:
    """As plain JSON values."""
    from dataclasses import asdict

    import torch

    from simdiff.io.machine import describe_machine
    from simdiff_kernels import backend_status, default_backend, installation_advice

    statuses = backend_status()
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    return {
        "version": _version("simdiff-kernels"),
        **{name: _version(name) for name in ("torch", "triton", *NEEDED, *EXTRAS)},
        "machine": describe_machine(),
        "threads": torch.get_num_threads(),
        "default_backend": {device: default_backend(device) for device in devices},
        "backends": [asdict(status) for status in statuses],
        "to_do": installation_advice(statuses),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
