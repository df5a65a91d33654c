"""Compiles the Triton kernels for a GPU that need not be present, and reports what came out.

`python tools/triton_compile.py --target cuda:90` prints one JSON line per kernel
variant. Must run without `TRITON_INTERPRET`, which replaces the kernels by Python.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from simdiff_kernels.backends import interpreting_triton
from simdiff_kernels.triton.fold import THREADS as FOLD_THREADS
from simdiff_kernels.triton.fold import _fold_kernel, _token_metrics_kernel
from simdiff_kernels.triton.launch import launch_options
from simdiff_kernels.triton.row_sums import (
    CONFIGURATIONS,
    THREADS,
    _row_sums_kernel,
    configuration,
)

ELEMENT_TYPES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp64": 8}  # bytes


def parse_target(text: str) -> GPUTarget:
    """`cuda:80`, `cuda:90`, ... or `hip:gfx942`."""
    backend, _, arch = text.partition(":")
    if backend == "cuda" and arch.isdigit():
        return GPUTarget("cuda", int(arch), 32)
    if backend == "hip" and arch.startswith("gfx"):
        return GPUTarget("hip", arch, 64)
    raise ValueError(f"target must be cuda:<capability> or hip:<arch>, got {text!r}")


def variants() -> Iterator[dict[str, Any]]:
    """Every configuration of every kernel, with a mask and strides where there may be some."""
    for element, size in ELEMENT_TYPES.items():
        rows = {"kernel": "row_sums", "element": element, "masked": True, "nested": True}
        for first in (0, *(row[0] for row in CONFIGURATIONS[:-1])):
            yield {**rows, "hidden_size": first // size + 1, "aligned": True}
        yield {**rows, "hidden_size": 1, "aligned": False}
    yield from ({"kernel": "fold", "kinds": "u8", "apart": apart} for apart in (False, True))
    yield from ({"kernel": "token_metrics", "element": element} for element in ("fp32", "fp64"))


class _Request(NamedTuple):
    """A kernel and what it is compiled for."""

    kernel: Any
    num_threads: int
    constants: dict[str, Any]
    pointers: dict[str, str | None]

    def types(self) -> dict[str, str]:
        """The type of each parameter; those of numbers stand in the kernel's source."""
        absent = {name for name, kind in self.pointers.items() if kind is None}
        constants = absent | set(self.constants)
        return {
            param.name: "constexpr"
            if param.name in constants
            else self.pointers.get(param.name) or param.annotation_type
            for param in self.kernel.params
        }


def _request(variant: dict[str, Any]) -> _Request:
    if variant["kernel"] == "row_sums":
        size = ELEMENT_TYPES[variant["element"]]
        row = configuration(variant["hidden_size"], size, variant["aligned"])
        constants = {name.upper(): value for name, value in row._asdict().items()}
        constants["NESTED"] = variant["nested"]
        states, mask = f"*{variant['element']}", "*i1" if variant["masked"] else None
        pointers = {"p_sums": "*fp64", "p_before": states, "p_after": states, "p_mask": mask}
        return _Request(_row_sums_kernel, THREADS, constants, pointers)
    constants = {"TOKENS": FOLD_THREADS}
    if variant["kernel"] == "token_metrics":
        pointers = {"p_sums": "*fp64", "p_per_token": f"*{variant['element']}"}
        return _Request(_token_metrics_kernel, FOLD_THREADS, constants, pointers)
    constants["APART"] = variant["apart"]
    kinds = variant["kinds"] and f"*{variant['kinds']}"
    pointers = {"p_moments": "*fp64", "p_counts": "*i64", "p_sums": "*fp64", "p_kinds": kinds}
    return _Request(_fold_kernel, FOLD_THREADS, constants, pointers)


def compile_variant(target: GPUTarget, variant: dict[str, Any]) -> Any:
    """Compile a kernel as the operators launch it.

    Of `row_sums`: "hidden_size" chooses the configuration, "nested" tells sequences that do not
    follow each other like tokens. Of `fold`: "kinds" is "u8", "i1" or None.
    """
    request = _request(variant)
    types = request.types()
    values = {
        (i,): request.constants.get(name)
        for i, (name, kind) in enumerate(types.items())
        if kind == "constexpr"
    }
    source = ASTSource(request.kernel, types, values, {})
    options = launch_options(request.num_threads, target.warp_size)
    return triton.compile(source, target=target, options=options)


def save_ptx(directory: Path, target: GPUTarget, variants: list[dict[str, Any]]) -> None:
    """Write `<index>.ptx` and `<index>.json`, what a launch needs, for each variant."""
    for index, variant in enumerate(variants):
        compiled = compile_variant(target, variant)
        (directory / f"{index}.ptx").write_text(compiled.asm["ptx"])
        types = _request(variant).types()
        launch = {
            "name": compiled.metadata.name,
            "threads": target.warp_size * compiled.metadata.num_warps,
            "shared": compiled.metadata.shared,
            "parameters": [name for name, kind in types.items() if kind != "constexpr"],
        }
        (directory / f"{index}.json").write_text(json.dumps(launch))


def _disassemble(cubin: bytes, option: str) -> str:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tools / "cuobjdump"), option, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, stack and local memory per thread, shared memory per CTA of a cubin."""
    text = _disassemble(cubin, "-res-usage")
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}
    return {
        "registers": usage["REG"],
        "stack": usage["STACK"],
        "shared": usage["SHARED"],
        "local": usage["LOCAL"],
    }


def _instructions(sass: str) -> list[tuple[int, str]]:
    """Address and text of every instruction, its predicate left out."""
    lines = re.findall(r"^\s+/\*([0-9a-f]+)\*/\s+(?:@!?\w+\s+)?([A-Z][^;]*);", sass, re.MULTILINE)
    return [(int(address, 16), text) for address, text in lines]


def loops(sass: str) -> list[Counter[str]]:
    """How often each opcode occurs in each innermost loop, in the order of the code."""
    found = _instructions(sass)
    jumps = [(address, re.search(r"BRA\S* .*?0x([0-9a-f]+)", text)) for address, text in found]
    spans = [(int(to[1], 16), address) for address, to in jumps if to is not None]
    spans = [(first, last) for first, last in spans if first < last]  # a jump to itself ends a file
    inner = [
        (first, last)
        for first, last in spans
        if not any(first <= other[0] and other[1] < last for other in spans)
    ]
    return [
        Counter(text.split()[0] for address, text in found if first <= address <= last)
        for first, last in inner
    ]


def describe(target: GPUTarget, variant: dict[str, Any]) -> dict[str, Any]:
    """Compile one variant and tell, for CUDA, its registers, memory and instructions."""
    compiled = compile_variant(target, variant)
    report = {**variant, "target": f"{target.backend}:{target.arch}"}
    report["threads"] = compiled.metadata.num_warps * target.warp_size
    if target.backend == "cuda":
        report.update(resources(compiled.asm["cubin"]), shared=compiled.metadata.shared)
        sass = _disassemble(compiled.asm["cubin"], "-sass")
        report["opcodes"] = Counter(text.split()[0] for _, text in _instructions(sass))
        report["loops"] = loops(sass)
        # How many groups of copies may be under way when a thread waits for the oldest.
        waits = re.findall(r"cp\.async\.wait_group\s+(\d+)", compiled.asm["ptx"])
        report["copies_ahead"] = max(map(int, waits), default=0)
    return report


def main() -> None:
    """Print one JSON line per variant."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default="cuda:90", help="cuda:80, cuda:90, hip:gfx942, ...")
    parser.add_argument(
        "--save",
        nargs=2,
        metavar=("DIRECTORY", "VARIANTS"),
        help="write the PTX of these variants, a JSON list, instead of describing all",
    )
    arguments = parser.parse_args()
    target = parse_target(arguments.target)
    if interpreting_triton():
        raise SystemExit("unset TRITON_INTERPRET: interpreted kernels cannot be compiled")
    if arguments.save:
        save_ptx(Path(arguments.save[0]), target, json.loads(arguments.save[1]))
        return
    for variant in variants():
        print(json.dumps(describe(target, variant)), flush=True)


if __name__ == "__main__":
    main()
