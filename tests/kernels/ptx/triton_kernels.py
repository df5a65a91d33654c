"""Triton kernels compiled for a GPU that need not be here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptxcheck import Gpu, Report


@dataclass
class Kernel:
    """A compiled kernel and what its launch needs."""

    ptx: str
    name: str
    threads: int
    shared: int
    parameters: list[str]

    def launch(
        self, gpu: Gpu, grid: int | tuple[int, int], arguments: dict[str, Any], **options: Any
    ) -> Report:
        """Launch with named arguments, which need not be of those that are constants here."""
        values = [arguments[name] for name in self.parameters]
        # Triton appends two pointers to scratch memory, which is not used.
        values += [None, None]
        return gpu.launch(self.name, grid, self.threads, values, self.shared, **options)


def compile_variants(
    target: str, variants: list[dict[str, Any]], folder: Path
) -> dict[str, Kernel]:
    """Compile in a process that does not interpret Triton; the keys are the variants as JSON."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    tool = Path(__file__).resolve().parents[3] / "tools" / "triton_compile.py"
    command = [sys.executable, tool, "--target", target]
    subprocess.run(
        [*command, "--save", str(folder), json.dumps(variants)], env=environment, check=True
    )
    found = {}
    for index, variant in enumerate(variants):
        info = json.loads((folder / f"{index}.json").read_text())
        ptx = (folder / f"{index}.ptx").read_text()
        found[json.dumps(variant)] = Kernel(ptx, **info)
    return found
