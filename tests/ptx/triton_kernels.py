"""The main Triton kernel and the joining one, compiled for a GPU that need not be here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptx import Gpu, Report

# The parameters of the main kernel; what a variant makes constant is missing from its PTX.
STRIDES = [
    f"{states}_{axis}_stride" for states in ("before", "after") for axis in ("outer", "inner")
]
PARAMETERS = [
    *("before", "after", "mask", "per_token", "scratch", "num_tokens", "inner", "hidden_size"),
    *STRIDES,
    "tiles_per_program",
]


@dataclass
class Kernel:
    """A compiled kernel and what its launch needs."""

    ptx: str
    name: str
    threads: int
    shared: int

    def launch(self, gpu: Gpu, grid: int, arguments: list[Any], **options: Any) -> Report:
        """Triton appends two hidden pointers to scratch memory, which is not used."""
        arguments = [*arguments, None, None]
        return gpu.launch(self.name, grid, self.threads, arguments, self.shared, **options)

    def launch_main(
        self, gpu: Gpu, grid: int, arguments: dict[str, Any], blocks: range | None = None
    ) -> Report:
        """Launch the main kernel with named arguments."""
        assert set(arguments) <= set(PARAMETERS)
        values = [arguments[name] for name in PARAMETERS if name in arguments]
        return self.launch(gpu, grid, values, blocks=blocks)


def compile_variants(
    target: str, variants: list[dict[str, Any]], folder: Path
) -> dict[str, Kernel]:
    """Compile in a process that does not interpret Triton; the keys are the variants as JSON."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    module = [sys.executable, "-m", "simdiff_kernels.triton.compile", "--target", target]
    subprocess.run(
        [*module, "--save", str(folder), json.dumps(variants)], env=environment, check=True
    )
    found = {}
    for index, variant in enumerate(variants):
        info = json.loads((folder / f"{index}.json").read_text())
        found[json.dumps(variant)] = Kernel(
            (folder / f"{index}.ptx").read_text(), info["kernel"], info["threads"], info["shared"]
        )
    return found
